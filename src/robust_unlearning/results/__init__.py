"""Answers on disk, brought together and compared; no model is loaded."""
