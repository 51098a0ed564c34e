"""Where a run's numbers go: a JSON-lines file always, TensorBoard when it is installed."""
