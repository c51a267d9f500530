"""The processes of one run, where torchrun has started several."""

import os


def num_processes() -> int:
    """How many there are; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
