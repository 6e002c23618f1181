"""Data formats: one file each."""
