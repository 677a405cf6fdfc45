"""Look at a model before training: activation capture, clip search, sensitivity."""
