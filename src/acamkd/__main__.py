"""`python -m acamkd`, the same as the command `acamkd`."""

from acamkd.cli import main

main()
