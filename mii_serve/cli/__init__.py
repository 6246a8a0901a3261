"""The `mii_serve` command. Importing it, and asking for help, loads nothing heavy: each command imports what it needs."""

from mii_serve.cli.command_line import main

__all__ = ["main"]
