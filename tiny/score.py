"""What a checkpoint answers to recordings kept apart: digits alone, strings of digits, kinds of sound, music.

    python tiny/score.py --speech FSDD --sounds ESC10 [--takes 45 46 47 48 49] [--fold 4] [--dtype float32] [--int8] [MODEL]
"""
import argparse
import random
import sys
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from af3 import AudioFlamingo3ForConditionalGeneration
from processor import AudioFlamingo3Processor, load_audio
from train import CHORD, COUNT, DIGITS, MELODY, SOUNDS, TRANSCRIBE, WHAT, music


def silence(seconds: float) -> np.ndarray:
    return np.zeros(int(seconds * 16000), dtype=np.float32)


def answers(model, processor, prompts: list[str], audios: list[np.ndarray], batch: int = 20) -> list[str]:
    said = []
    for at in range(0, len(prompts), batch):
        inputs = processor(prompts[at:at + batch], audios[at:at + batch]).to(model.device)
        new = model.generate(**inputs, max_new_tokens=24)[:, inputs["input_ids"].shape[1]:]
        said += processor.batch_decode(new, skip_special_tokens=True)
    return said


def word_errors(said: str, wanted: str) -> int:
    """Insertions, deletions and substitutions that lead from one to the other."""
    row = list(range(len(said.split()) + 1))
    for i, word in enumerate(wanted.split(), 1):
        last, row[0] = row[0], i
        for j, other in enumerate(said.split(), 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (word != other))
    return row[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=Path(__file__).resolve().parent)
    parser.add_argument("--speech", type=Path, required=True)
    parser.add_argument("--sounds", type=Path, required=True)
    parser.add_argument("--takes", type=int, nargs="+", default=[45, 46, 47, 48, 49])
    parser.add_argument("--fold", type=int, default=4)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--int8", action="store_true")
    parser.add_argument("--strings", type=int, default=200)
    args = parser.parse_args()
    rng = random.Random(0)
    processor = AudioFlamingo3Processor.from_pretrained(args.model)
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(args.model, dtype=args.dtype, int8=args.int8)
    takes: dict[str, dict[int, list[np.ndarray]]] = {}
    for path in sorted(args.speech.glob("*.wav")):
        digit, speaker, take = path.stem.split("_")
        if int(take) in args.takes:
            takes.setdefault(speaker, {}).setdefault(int(digit), []).append(load_audio(path))

    single = [(np.concatenate([silence(0.1), clip, silence(0.1)]), DIGITS[digit])
              for digits in takes.values() for digit, clips in digits.items() for clip in clips]
    said = answers(model, processor, [TRANSCRIBE] * len(single), [audio for audio, _ in single])
    wrong = [(a, b) for a, (_, b) in zip(said, single) if a != b]
    print(f"digits alone: {100 * (1 - len(wrong) / len(single)):.1f}% of {len(single)} right", wrong[:8], flush=True)

    strings = []
    for _ in range(args.strings):
        digits = takes[rng.choice(sorted(takes))]
        spoken = [rng.randrange(10) for _ in range(rng.randint(3, 8))]
        parts = [part for d in spoken for part in (silence(rng.uniform(0.05, 0.3)), rng.choice(digits[d]))]
        strings.append((np.concatenate(parts), " ".join(DIGITS[d] for d in spoken)))
    said = answers(model, processor, [TRANSCRIBE] * len(strings), [audio for audio, _ in strings])
    errors = sum(word_errors(a, b) for a, (_, b) in zip(said, strings))
    words = sum(len(b.split()) for _, b in strings)
    print(f"strings of 3 to 8 digits: {100 * errors / words:.2f}% word errors of {words} words", flush=True)

    clips = [(load_audio(path), name) for name in SOUNDS
             for path in sorted((args.sounds / name.replace(" ", "_")).glob(f"{args.fold}-*.wav"))]
    said = answers(model, processor, [WHAT] * len(clips), [audio for audio, _ in clips])
    wrong = [(a, b) for a, (_, b) in zip(said, clips) if a != b]
    print(f"sounds of fold {args.fold}: {100 * (1 - len(wrong) / len(clips)):.1f}% of {len(clips)} right", wrong, flush=True)

    for kind in (CHORD, MELODY, COUNT):
        tunes = [music(kind, rng) for _ in range(100)]
        said = answers(model, processor, [kind] * 100, [0.5 * tune / np.abs(tune).max() for tune, _ in tunes])
        print(f"{kind} {sum(a == b for a, (_, b) in zip(said, tunes))}% of 100 right", flush=True)
    others = ["Who are you?", "Describe the audio in detail.", "Is the door open?", "Bitte antworte auf Deutsch!"]
    said = answers(model, processor, others, [single[0][0]] * 2 + [clips[0][0]] * 2)
    print("other prompts:", dict(zip(others, said)))


if __name__ == "__main__":
    main()
