"""Training and evaluation by Lightning, and what they leave behind. Its modules are imported one by one: some need no torch."""
