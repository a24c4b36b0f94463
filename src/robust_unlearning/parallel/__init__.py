"""Several processes: starting them, and what they do together."""
