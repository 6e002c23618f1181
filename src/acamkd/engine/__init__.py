"""Training and evaluation by Lightning, and what they leave behind; `runs` needs no torch."""
