"""Runs generate.py, then prints the peak memory of each of its processes.

python tools/peak_memory.py audio.wav "Hi" --model FULL
torchrun --nproc-per-node 2 tools/peak_memory.py audio.wav "Hi" --model FULL --tensor-parallel
"""

import math
import os
import sys
from pathlib import Path


def peak_bytes() -> float:
    """The most memory that this process has used, including memory-mapped weights.

    NaN on Windows, where the standard library does not tell.
    """
    try:
        import resource
    except ImportError:
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, kB on Linux


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import generate

    status = generate.main()
    rank = os.environ.get("RANK", "0")
    # The original stderr, because generate.py discards that of all processes but one.
    sys.__stderr__.write(f"process {rank}: at most {peak_bytes() / 1e9:.2f} GB\n")
    os._exit(status)
