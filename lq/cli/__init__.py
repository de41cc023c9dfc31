"""The command line: ``lq [run] key=value ...``."""

from lq.cli.main import main

__all__ = ["main"]
