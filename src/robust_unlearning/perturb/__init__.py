"""Perturbed question sets on disk: keywords, their harmless controls, the data set, and lm-eval tasks that run it."""
