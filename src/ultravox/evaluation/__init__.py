"""What a checkpoint can do, measured: error rates with intervals, controls, bounds, spoken questions, and the report."""
