"""Compare methods over seeds."""
