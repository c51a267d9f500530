"""Where things are."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tiny"
DATA = ROOT / "tests" / "data"  # checkpoints, adapters, and what transformers computes from them
SHARED = ROOT.parent / "shared"  # files that are too large for the repository
