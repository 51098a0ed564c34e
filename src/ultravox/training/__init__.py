"""Training: a loop that knows no model, the tasks that do, and what a run leaves behind."""
