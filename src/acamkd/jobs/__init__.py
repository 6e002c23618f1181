"""The jobs: one file for each command."""
