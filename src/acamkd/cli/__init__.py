"""The command line: each command is one call. Heavy imports stay inside the commands, so that help appears at once."""

from acamkd.cli import train, deploy, study  # noqa: I001 - the order of the commands in the help
from acamkd.cli.app import app, main

__all__ = ["app", "deploy", "main", "study", "train"]
