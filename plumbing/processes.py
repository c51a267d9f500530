"""The processes of one run, where torchrun has started several."""

import os


def num_processes() -> int:
    """How many there are; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_number() -> int:
    """From 0 on; torchrun calls it the rank."""
    return int(os.environ["RANK"]) if num_processes() > 1 else 0


def is_first_process() -> bool:
    return process_number() == 0
