"""Search of a recipe's fields beyond grids, with Optuna."""
