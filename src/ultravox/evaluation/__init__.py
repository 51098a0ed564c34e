"""What a checkpoint can do, measured: error rates with intervals, controls, bounds, spoken questions, a report."""
