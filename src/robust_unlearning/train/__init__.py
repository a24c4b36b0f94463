"""Training: the engine, the objective, and the loop."""
