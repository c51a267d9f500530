"""How much faster many sounds are answered together than one by one, and a second question than the first.

    python tests/throughput.py [FOLDER of recordings] [--clips 200] [--model tiny] [--max-new-tokens 64]

Writes clips of 0.5 to 30 s, made of the folder's recordings laid end to end, or else of noise and tones; answers them all
with generate.py at several batch sizes, and some of them with one run of generate.py each. Then two minutes of sound are
asked two questions by --chat. Prints Markdown tables.
"""
import argparse
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from processor import SAMPLE_RATE, load_audio
from signals import sound, write_wav


def clip(recordings: list[Path], seconds: float, choose: random.Random) -> np.ndarray:
    pieces = [sound(round(seconds * SAMPLE_RATE), seed=choose.randrange(1000))] if not recordings else []
    while sum(map(len, pieces)) < seconds * SAMPLE_RATE:
        pieces.append(load_audio(choose.choice(recordings)))
    return np.concatenate(pieces)[:round(seconds * SAMPLE_RATE)]


def generate(args: argparse.Namespace, *arguments, **options) -> tuple[float, str]:
    """Seconds of a whole run of generate.py, and its stderr."""
    start = time.perf_counter()
    command = [sys.executable, ROOT / "generate.py", "--model", args.model, "--max-new-tokens", args.max_new_tokens, *arguments]
    command = list(map(str, command))
    result = subprocess.run(command, capture_output=True, text=True, check=True, **options)
    return time.perf_counter() - start, result.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--model", default=str(ROOT / "tiny"))
    parser.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args()
    recordings = sorted(args.folder.rglob("*.wav")) if args.folder else []
    choose = random.Random(0)
    with tempfile.TemporaryDirectory() as work:
        clips = [write_wav(Path(work, f"{i:03d}.wav"), clip(recordings, 0.5 * 60 ** choose.random(), choose)) for i in range(args.clips)]
        seconds = sum(path.stat().st_size for path in clips) / 2 / SAMPLE_RATE
        print(f"{args.clips} clips of 0.5 to 30 s, {seconds:.0f} s together\n\n| | clips a second |\n|---|---|", flush=True)
        some = clips[::20]
        each = sum(generate(args, path, "What sound is this?", "--quiet")[0] for path in some) / len(some)
        print(f"| a run of generate.py each ({len(some)} of them) | {1 / each:.2f} |", flush=True)
        for size in (1, 2, 4, 8, 16):
            took, err = generate(args, work, "What sound is this?", "--batch-size", size)
            answering = float(re.search(r" in ([\d.]+) s", err)[1])
            print(f"| one run, --batch-size {size} | {args.clips / took:.2f} ({args.clips / answering:.2f} without its start) |", flush=True)
        long = write_wav(Path(work, "two_minutes.wav"), clip(recordings, 120, choose))
        _, err = generate(args, "--chat", long, input="What sound is this?\nWhat sound is this?\n/quit\n")
        first, second = (float(found) for found in re.findall(r"the first after ([\d.]+) s", err))
        print(f"\nfirst token of two questions on two minutes of sound: {first:.2f} s, {second:.3f} s, {second / first:.1%}")


if __name__ == "__main__":
    main()
