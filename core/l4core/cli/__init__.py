"""The command line. One file a command; options come from the table in config.py, nothing heavy is imported before a command runs."""

from l4core.cli.main import main

__all__ = ["main"]
