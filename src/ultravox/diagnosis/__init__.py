"""Whether a run that does not learn has a fault, and which: fifteen checks of its data, labels, model and optimizer."""
