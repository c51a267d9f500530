"""Measures the accuracy of word timestamps on strings of digits with known boundaries.

    python tools/timestamps.py [--speech FSDD] [--sounds ESC10] [--strings 200] [--model tiny]

Each digit is a separate recording, trimmed to where it is louder than 2% of its peak. A string
consists of such digits, each after a pause of 0.05 to 0.3 s. The voices are those of espeak-ng (a
Debian package) that tiny/ was not trained on. --speech adds a folder of recordings
DIGIT_SPEAKER_TAKE.wav; tiny/ was trained on takes 5 to 49 of FSDD. Each kind is measured without
and with noise.
--sounds reports the highest score of a head for answers that are not transcriptions.
"""

import argparse
import random
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
from af3 import AudioFlamingo3ForConditionalGeneration
from extras.alignment import Alignment, align
from plumbing.audio_file import load_audio
from processor import SAMPLE_RATE, AudioFlamingo3Processor

DIGITS = "zero one two three four five six seven eight nine".split()
PROMPT = "Transcribe the input speech."
PAUSE = (0.05, 0.3)  # seconds
SIGNAL_TO_NOISE = 20  # dB

# Voices of espeak-ng that are not listed in tiny/README.md, and their speeds.
ACCENTS = ["en-us", "en-gb", "en-gb-scotland", "en-029"]
VOICES = [
    *("Alex", "Alicia", "Andrea", "Andy", "Annie", "Gene", "Hugo", "Lee", "Michael", "Mike"),
    *("adam", "anika", "belinda", "benjamin", "boris", "david", "ed", "edward", "grandpa"),
    *("john", "linda", "max", "quincy", "rob", "robert", "shelby", "steph", "travis", "zac"),
]
WORDS_A_MINUTE = [110, 130, 150, 170]


@dataclass
class Figures:
    """Measurements on strings of one kind; errors are in seconds."""

    strings: int = 0
    answered: int = 0  # correctly; only the words of these answers are measured
    middle_inside: list[bool] = field(default_factory=list)
    begin_errors: list[float] = field(default_factory=list)
    end_errors: list[float] = field(default_factory=list)
    best_heads: Counter = field(default_factory=Counter)
    scores: list[float] = field(default_factory=list)

    def add(self, alignment: Alignment, spans: list[tuple[float, float]]) -> None:
        self.answered += 1
        best = alignment.heads[0]
        self.best_heads[best.layer, best.head] += 1
        self.scores.append(best.score)
        for word, (begin, end) in zip(alignment.words, spans, strict=True):
            self.middle_inside.append(begin <= (word.begin + word.end) / 2 <= end)
            self.begin_errors.append(abs(word.begin - begin))
            self.end_errors.append(abs(word.end - end))

    def row(self, kind: str) -> str:
        (layer, head), count = self.best_heads.most_common(1)[0]
        cells = [
            kind,
            f"{self.answered} of {self.strings}",
            str(len(self.middle_inside)),
            f"{np.mean(self.middle_inside):.1%}",
            f"{1000 * np.median(self.begin_errors):.0f} ms",
            f"{1000 * np.quantile(self.begin_errors, 0.9):.0f} ms",
            f"{1000 * np.median(self.end_errors):.0f} ms",
            f"layer {layer + 1}, head {head + 1}: {count / self.answered:.0%}",
            f"{min(self.scores):.2f}",
        ]
        return "| " + " | ".join(cells) + " |"


HEADER = """\
| strings of | answered correctly | words | middle inside | begin, median | begin, 90% \
| end, median | best head | lowest score |
|---|---|---|---|---|---|---|---|---|"""


class Examiner:
    def __init__(self, path: str):
        self.processor = AudioFlamingo3Processor.from_pretrained(path)
        self.model = AudioFlamingo3ForConditionalGeneration.from_pretrained(path)

    def answer(self, prompt: str, waveform: np.ndarray) -> Alignment:
        inputs = self.processor(prompt, waveform).to(self.model.device)
        ids = self.model.generate(**inputs, max_new_tokens=24, do_sample=False)
        new_ids = ids[0, inputs["input_ids"].shape[1] :]
        return align(self.processor, self.model, inputs, new_ids)

    def measure(self, speakers: dict, count: int, with_noise: bool) -> Figures:
        rng = random.Random(0)
        figures = Figures(strings=count)
        for _ in range(count):
            waveform, digits, spans = make_string(speakers, rng)
            if with_noise:
                waveform = add_noise(waveform, seed=len(waveform))
            alignment = self.answer(PROMPT, waveform)
            if [word.text for word in alignment.words] == digits:
                figures.add(alignment, spans)
        return figures

    def largest_score_of_others(self, paths: list[Path]) -> tuple[float, int]:
        """Returns the highest score among answers that are not transcriptions, and their number."""
        scores = []
        for path in paths:
            for prompt in ("Describe the audio.", "Who are you?"):
                alignment = self.answer(prompt, load_audio(path))
                if len(alignment.words) > 1:
                    scores.append(alignment.heads[0].score)
        return max(scores), len(scores)


def speak_digits(folder: Path) -> None:
    """Writes DIGIT_VOICE_0.wav for each digit and voice of espeak-ng."""
    for number, voice in enumerate(VOICES):
        accent = ACCENTS[number % len(ACCENTS)]
        speed = str(WORDS_A_MINUTE[number % len(WORDS_A_MINUTE)])
        for digit, word in enumerate(DIGITS):
            path = folder / f"{digit}_{voice}_0.wav"
            command = ["espeak-ng", "-v", f"{accent}+{voice}", "-s", speed, "-w", path, word]
            subprocess.run(command, check=True)


def read_digits(folder: Path) -> dict[str, dict[int, list[np.ndarray]]]:
    """Returns speaker -> digit -> waveforms, without silence at both ends."""
    speakers = {}
    for path in sorted(folder.glob("*.wav")):
        digit, speaker, _ = path.stem.split("_")
        waveform = load_audio(path, SAMPLE_RATE)
        loud = np.flatnonzero(np.abs(waveform) > 0.02 * np.abs(waveform).max())
        digits = speakers.setdefault(speaker, {})
        digits.setdefault(int(digit), []).append(waveform[loud[0] : loud[-1] + 1])
    return speakers


def make_string(speakers: dict, rng: random.Random):
    """Three to eight digits by one speaker. Returns the waveform, the words, their (begin, end)."""
    recordings = speakers[rng.choice(sorted(speakers))]
    parts = []
    words = []
    spans = []
    length = 0  # samples so far
    for _ in range(rng.randint(3, 8)):
        digit = rng.randrange(10)
        pause = np.zeros(round(rng.uniform(*PAUSE) * SAMPLE_RATE), dtype=np.float32)
        clip = rng.choice(recordings[digit])
        begin = length + len(pause)
        length = begin + len(clip)
        parts += [pause, clip]
        words.append(DIGITS[digit])
        spans.append((begin / SAMPLE_RATE, length / SAMPLE_RATE))
    parts.append(np.zeros(round(0.1 * SAMPLE_RATE), dtype=np.float32))
    return np.concatenate(parts), words, spans


def add_noise(waveform: np.ndarray, seed: int) -> np.ndarray:
    """Adds white noise, also to the pauses."""
    noise = np.random.default_rng(seed).standard_normal(len(waveform)).astype(np.float32)
    level = np.sqrt(np.mean(waveform**2)) * 10 ** (-SIGNAL_TO_NOISE / 20)
    return waveform + level * noise


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--speech", type=Path)
    parser.add_argument("--sounds", type=Path)
    parser.add_argument("--strings", type=int, default=200)
    parser.add_argument("--model", default=str(ROOT / "tiny"))
    args = parser.parse_args()
    examiner = Examiner(args.model)
    kinds = {}
    with tempfile.TemporaryDirectory() as folder:
        speak_digits(Path(folder))
        kinds[f"{len(VOICES)} voices of espeak-ng"] = read_digits(Path(folder))
    if args.speech:
        kinds[f"recordings in {args.speech.name}"] = read_digits(args.speech)
    print(HEADER, flush=True)
    for kind, speakers in kinds.items():
        print(examiner.measure(speakers, args.strings, with_noise=False).row(kind), flush=True)
        row = examiner.measure(speakers, args.strings, with_noise=True).row(f"{kind}, with noise")
        print(row, flush=True)
    if args.sounds:
        largest, count = examiner.largest_score_of_others(sorted(args.sounds.rglob("*.wav")))
        print(f"\n{count} answers that are not transcriptions: the highest score is {largest:.2f}")


if __name__ == "__main__":
    main()
