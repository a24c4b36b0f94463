"""Scoring models on suites and on tasks of lm-evaluation-harness."""
