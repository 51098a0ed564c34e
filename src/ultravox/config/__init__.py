"""Typed run configurations: one YAML file per run, every key known, ranges checked. Imports no torch."""
