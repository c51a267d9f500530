"""The processes of one run, where torchrun has started several."""

import os


def num_processes() -> int:
    """How many there are; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    return num_processes() == 1 or os.environ["RANK"] == "0"
