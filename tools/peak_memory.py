"""Runs generate.py, then prints the peak memory of each of its processes.

python tools/peak_memory.py audio.wav "Hi" --model FULL
torchrun --nproc-per-node 2 tools/peak_memory.py audio.wav "Hi" --model FULL --tensor-parallel
"""

import os
import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import generate

status = generate.main()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # includes memory-mapped weights
rank = os.environ.get("RANK", "0")
# The original stderr, because generate.py discards that of all processes but one.
sys.__stderr__.write(f"process {rank}: at most {peak / 1e9:.2f} GB\n")
os._exit(status)
