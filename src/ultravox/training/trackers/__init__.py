"""Where a run's numbers go: a JSON-lines file always, TensorBoard and experiment trackers when they are asked for."""
