"""Self-contained HTML pages about runs and comparisons, and everything that is drawn."""
