"""The `bitdistiller` command: one file per verb; nothing heavy is imported before a verb needs it."""

from bitdistiller_peft.cli.dispatch import main

__all__ = ["main"]
