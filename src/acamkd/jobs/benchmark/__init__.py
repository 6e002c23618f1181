"""Benchmark of the forms of a network."""
