"""What is minimised. Each objective returns a sum and the count that it is a sum over."""
