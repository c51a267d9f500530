"""Scores a checkpoint on held-out recordings: digits, strings of digits, sounds, music.

python tiny/evaluate.py --speech FSDD --sounds ESC10 [MODEL] [--takes 45 46 47 48 49] [--fold 4]
"""

import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from af3 import AudioFlamingo3ForConditionalGeneration
from extras.quantize import quantize
from extras.score import word_errors
from plumbing.audio_file import load_audio
from plumbing.terminal import exit_with
from processor import AudioFlamingo3Processor
from train import CHORD, COUNT, DIGITS, MELODY, SOUNDS, TRANSCRIBE, WHAT, music


class Answerer:
    """Asks a model about many recordings in batches."""

    def __init__(self, args: argparse.Namespace):
        self.processor = AudioFlamingo3Processor.from_pretrained(args.model)
        self.model = AudioFlamingo3ForConditionalGeneration.from_pretrained(
            args.model, dtype=args.dtype
        )
        if args.int8:
            quantize(self.model)
        if args.int4:
            quantize(self.model, bits=4)

    def answers(
        self, prompts: list[str], waveforms: list[np.ndarray], batch_size: int = 20
    ) -> Iterator[str]:
        for start in range(0, len(prompts), batch_size):
            batch = slice(start, start + batch_size)
            inputs = self.processor(prompts[batch], waveforms[batch]).to(self.model.device)
            ids = self.model.generate(**inputs, max_new_tokens=24, do_sample=False)
            new_ids = ids[:, inputs["input_ids"].shape[1] :]
            yield from self.processor.batch_decode(new_ids, skip_special_tokens=True)

    def ask(self, prompt: str, examples: list[tuple[np.ndarray, str]]) -> list[tuple[str, str]]:
        """Returns (answer, correct answer) for each (waveform, correct answer)."""
        waveforms = [waveform for waveform, _ in examples]
        answers = self.answers([prompt] * len(examples), waveforms)
        return [(answer, right) for answer, (_, right) in zip(answers, examples)]


def silence(seconds: float) -> np.ndarray:
    return np.zeros(int(seconds * 16000), dtype=np.float32)


def read_takes(folder: Path, takes: list[int]) -> dict[str, dict[int, list[np.ndarray]]]:
    """Returns speaker -> digit -> waveforms."""
    speakers = {}
    for path in sorted(folder.glob("*.wav")):
        digit, speaker, take = path.stem.split("_")
        if int(take) in takes:
            digits = speakers.setdefault(speaker, {})
            digits.setdefault(int(digit), []).append(load_audio(path))
    if not speakers:
        raise FileNotFoundError(f"{folder}: no DIGIT_SPEAKER_TAKE.wav with takes {takes} inside.")
    return speakers


def single_digits(speakers: dict) -> list[tuple[np.ndarray, str]]:
    examples = []
    for digits in speakers.values():
        for digit, waveforms in digits.items():
            for waveform in waveforms:
                padded = np.concatenate([silence(0.1), waveform, silence(0.1)])
                examples.append((padded, DIGITS[digit]))
    return examples


def digit_strings(speakers: dict, count: int, rng: random.Random) -> list[tuple[np.ndarray, str]]:
    """Strings of 3 to 8 digits, each by one speaker."""
    examples = []
    for _ in range(count):
        waveforms = speakers[rng.choice(sorted(speakers))]
        digits = [rng.randrange(10) for _ in range(rng.randint(3, 8))]
        parts = []
        for digit in digits:
            parts.append(silence(rng.uniform(0.05, 0.3)))
            parts.append(rng.choice(waveforms[digit]))
        text = " ".join(DIGITS[digit] for digit in digits)
        examples.append((np.concatenate(parts), text))
    return examples


def sounds(folder: Path, fold: int) -> list[tuple[np.ndarray, str]]:
    examples = []
    for name in SOUNDS:
        for path in sorted((folder / name.replace(" ", "_")).glob(f"{fold}-*.wav")):
            examples.append((load_audio(path), name))
    if not examples:
        raise FileNotFoundError(f"{folder}: no files like rain/{fold}-*.wav inside.")
    return examples


def tunes(kind: str, count: int, rng: random.Random) -> list[tuple[np.ndarray, str]]:
    examples = []
    for _ in range(count):
        waveform, right = music(kind, rng)
        examples.append((0.5 * waveform / np.abs(waveform).max(), right))
    return examples


def wrong_ones(answers: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(answer, right) for answer, right in answers if answer != right]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default=Path(__file__).resolve().parent)
    parser.add_argument("--speech", type=Path, required=True)
    parser.add_argument("--sounds", type=Path, required=True)
    parser.add_argument("--takes", type=int, nargs="+", default=[45, 46, 47, 48, 49])
    parser.add_argument("--fold", type=int, default=4)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--int8", action="store_true")
    parser.add_argument("--int4", action="store_true")
    parser.add_argument("--strings", type=int, default=200)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    rng = random.Random(0)
    speakers = read_takes(args.speech, args.takes)
    clips = sounds(args.sounds, args.fold)
    answerer = Answerer(args)

    singles = single_digits(speakers)
    wrong = wrong_ones(answerer.ask(TRANSCRIBE, singles))
    right = 100 * (1 - len(wrong) / len(singles))
    print(f"single digits: {right:.1f}% of {len(singles)} correct", wrong[:8], flush=True)

    answers = answerer.ask(TRANSCRIBE, digit_strings(speakers, args.strings, rng))
    errors = sum(word_errors(answer, right) for answer, right in answers)
    words = sum(len(right.split()) for _, right in answers)
    rate = 100 * errors / words
    print(f"strings of 3 to 8 digits: {rate:.2f}% word error rate on {words} words", flush=True)

    wrong = wrong_ones(answerer.ask(WHAT, clips))
    right = 100 * (1 - len(wrong) / len(clips))
    print(f"sounds of fold {args.fold}: {right:.1f}% of {len(clips)} correct", wrong, flush=True)

    for kind in (CHORD, MELODY, COUNT):
        wrong = wrong_ones(answerer.ask(kind, tunes(kind, 100, rng)))
        print(f"{kind} {100 - len(wrong)}% of 100 correct", flush=True)

    others = [
        "Who are you?",
        "Describe the audio in detail.",
        "Is the door open?",
        "Bitte antworte auf Deutsch!",
    ]
    waveforms = [singles[0][0]] * 2 + [clips[0][0]] * 2
    print("other prompts:", dict(zip(others, answerer.answers(others, waveforms))))


if __name__ == "__main__":
    exit_with(main)
