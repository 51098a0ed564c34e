"""Whether a run that does not learn has a fault, and which: eighteen checks of data, labels, model and optimizer."""
