"""Measures how much faster batches of recordings are, and a second question about a recording.

    python tools/throughput.py [FOLDER] [--clips 200] [--model tiny] [--max-new-tokens 64]

Writes clips of 0.5 to 30 s, made by concatenating recordings from FOLDER, or of tones and noise if
there is no FOLDER. Runs generate.py on all clips at several batch sizes, and on some clips one by
one. Then asks two questions about two minutes of audio with --chat. Prints tables.
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
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
from plumbing.audio_file import load_audio
from plumbing.terminal import exit_with
from processor import SAMPLE_RATE
from signals import sound, write_wav

PROMPT = "What sound is this?"


def make_clip(recordings: list[Path], seconds: float, rng: random.Random) -> np.ndarray:
    samples = round(seconds * SAMPLE_RATE)
    if not recordings:
        return sound(samples, seed=rng.randrange(1000))
    parts = []
    while sum(len(part) for part in parts) < samples:
        parts.append(load_audio(rng.choice(recordings)))
    return np.concatenate(parts)[:samples]


def generate(args: argparse.Namespace, *arguments, **options) -> tuple[float, str]:
    """Runs generate.py; returns the seconds it took and its stderr."""
    command = [sys.executable, ROOT / "generate.py", "--greedy", "--model", args.model]
    command += ["--max-new-tokens", args.max_new_tokens, *arguments]
    start = time.perf_counter()
    result = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, **options
    )
    if result.returncode != 0:
        raise ValueError(f"generate.py: {result.stderr.strip()}")
    return time.perf_counter() - start, result.stderr


def time_batches(args: argparse.Namespace, folder: str, clips: list[Path]) -> None:
    """Prints the clips per second, one by one and in batches."""
    print("| | clips per second |\n|---|---|", flush=True)
    some = clips[::20]
    seconds = sum(generate(args, path, PROMPT, "--quiet")[0] for path in some) / len(some)
    print(
        f"| a separate run of generate.py each ({len(some)} of them) | {1 / seconds:.2f} |",
        flush=True,
    )
    for size in (1, 2, 4, 8, 16):
        seconds, stderr = generate(args, folder, PROMPT, "--batch-size", size)
        answering = float(re.search(r" in ([\d.]+) s", stderr)[1])
        rate = len(clips) / seconds
        rate_without_start = len(clips) / answering
        print(
            f"| one run, --batch-size {size} | {rate:.2f} "
            f"({rate_without_start:.2f} without startup) |",
            flush=True,
        )


def time_questions(args: argparse.Namespace, path: Path) -> None:
    """Prints the seconds to the first token for two questions about the same recording."""
    lines = f"{PROMPT}\n{PROMPT}\n/quit\n"
    _, stderr = generate(args, "--chat", path, input=lines)
    first, second = re.findall(r"the first after ([\d.]+) s", stderr)
    ratio = float(second) / float(first)
    print(f"\nfirst token of two questions about two minutes: {first} s, {second} s, {ratio:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--model", default=str(ROOT / "tiny"))
    parser.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args()
    if args.clips < 1:
        parser.error("--clips must be at least 1")
    recordings = []
    if args.folder:
        recordings = sorted(args.folder.rglob("*.wav"))
        if not recordings:
            raise FileNotFoundError(f"{args.folder}: no WAV files inside.")
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        clips = []
        for number in range(args.clips):
            waveform = make_clip(recordings, 0.5 * 60 ** rng.random(), rng)
            clips.append(write_wav(Path(folder, f"{number:03d}.wav"), waveform))
        seconds = sum(path.stat().st_size for path in clips) / 2 / SAMPLE_RATE
        print(f"{args.clips} clips of 0.5 to 30 s, {seconds:.0f} s together\n")
        time_batches(args, folder, clips)
        long = write_wav(Path(folder, "two_minutes.wav"), make_clip(recordings, 120, rng))
        time_questions(args, long)


if __name__ == "__main__":
    exit_with(main)
