"""Writes training data that teaches tiny/ who is speaking, from DIGIT_SPEAKER_TAKE.wav files.

    python tiny/speakers.py RECORDINGS OUT

OUT/train.jsonl      takes before 45; also asks for the digits, so that tiny/ does not forget them
OUT/held_out.jsonl   takes from 45 on; the "task" of each line is speaker, digit or string
OUT/strings/         strings of digits, concatenated from recordings of one speaker
"""

import argparse
import json
import random
import sys
import wave
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plumbing.audio_file import load_audio

FIRST_HELD_OUT_TAKE = 45
SAMPLE_RATE = 8000  # of the recordings, in Hz
DIGITS = "zero one two three four five six seven eight nine".split()
WHO = "Who is speaking?"
TRANSCRIBE = "Transcribe the input speech."


class Recording:
    def __init__(self, path: Path):
        digit, self.speaker, take = path.stem.split("_")
        self.path = path.resolve()
        self.word = DIGITS[int(digit)]
        self.is_held_out = int(take) >= FIRST_HELD_OUT_TAKE


def line(audio: Path, prompt: str, answer: str, task: str) -> dict:
    return {"audio": str(audio), "prompt": prompt, "answer": answer, "task": task}


def lines_of_one(recordings: list[Recording]) -> list[dict]:
    """Asks both questions about each recording."""
    lines = []
    for recording in recordings:
        lines.append(line(recording.path, WHO, recording.speaker, "speaker"))
        lines.append(line(recording.path, TRANSCRIBE, recording.word, "digit"))
    return lines


def lines_of_strings(recordings: list[Recording], count: int, folder: Path, rng) -> list[dict]:
    """Writes strings of 2 to 8 digits, each by one speaker, and asks for their transcriptions."""
    folder.mkdir(parents=True, exist_ok=True)
    by_speaker = {}
    for recording in recordings:
        by_speaker.setdefault(recording.speaker, []).append(recording)
    lines = []
    for number in range(count):
        speaker = rng.choice(sorted(by_speaker))
        said = rng.choices(by_speaker[speaker], k=rng.randint(2, 8))
        path = folder / f"{number}.wav"
        write_string(path, said, rng)
        words = " ".join(recording.word for recording in said)
        lines.append(line(path.resolve(), TRANSCRIBE, words, "string"))
    return lines


def write_string(path: Path, said: list[Recording], rng: random.Random) -> None:
    """Writes 16-bit audio: the recordings, each after 0.05 to 0.3 s of silence."""
    parts = []
    for recording in said:
        parts.append(np.zeros(int(rng.uniform(0.05, 0.3) * SAMPLE_RATE)))
        parts.append(load_audio(recording.path, SAMPLE_RATE))
    samples = np.concatenate(parts).clip(-1, 1) * 32767
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
        file.writeframes(samples.astype("<i2").tobytes())


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recordings", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    rng = random.Random(0)
    recordings = [Recording(path) for path in sorted(args.recordings.glob("*_*_*.wav"))]
    if not recordings:
        parser.error(f"{args.recordings}: no DIGIT_SPEAKER_TAKE.wav files inside")
    held_out = [recording for recording in recordings if recording.is_held_out]
    trained_on = [recording for recording in recordings if not recording.is_held_out]
    strings = args.out / "strings"
    train_lines = lines_of_one(trained_on)
    train_lines += lines_of_strings(trained_on, 1600, strings / "train", rng)
    held_out_lines = lines_of_one(held_out)
    held_out_lines += lines_of_strings(held_out, 200, strings / "held_out", rng)
    write_lines(args.out / "train.jsonl", train_lines)
    write_lines(args.out / "held_out.jsonl", held_out_lines)


if __name__ == "__main__":
    main()
