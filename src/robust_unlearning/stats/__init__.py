"""Estimates with intervals, and tests of paired answers: numbers in, numbers out."""
