"""The planted-knowledge benchmark: a closed world of invented facts, taught to a model, to be unlearned again."""
