"""Texts to forget and retain, and multiple-choice questions."""
