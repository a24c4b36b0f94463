"""Sweeps, searches, the planted study and the demo, over one runner."""
