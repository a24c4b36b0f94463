"""Checkpoints: finding, converting and loading them, and their decoder layers."""
