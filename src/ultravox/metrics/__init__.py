"""Scores: text normalisation, error rates, and the intervals that go with every number."""
