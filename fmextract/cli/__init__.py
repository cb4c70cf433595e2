"""The command line: options, commands, and what they print."""

from fmextract.cli import commands, show
from fmextract.cli.app import main

__all__ = ["commands", "main", "show"]
