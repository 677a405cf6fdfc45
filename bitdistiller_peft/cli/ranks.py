"""One command in several processes, as torchrun starts it: all compute, the first one speaks and writes."""

from __future__ import annotations

import os


def is_main_process() -> bool:
    """Whether this is the only process, or the first of several on all machines."""
    return int(os.environ.get("RANK", "0")) == 0
