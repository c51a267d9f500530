"""The number of processes that torchrun has started, and which of them this is."""

import os


def num_processes() -> int:
    """Returns how many processes there are; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_number() -> int:
    """Returns the rank of this process, starting at 0."""
    if num_processes() == 1:
        return 0
    return int(os.environ["RANK"])


def is_first_process() -> bool:
    return process_number() == 0
