"""The sounds that tests and goldens share: made by formula, so that no recording lies in the repository."""
import wave
from pathlib import Path

import numpy as np

TEXT = "What sound is this? Ünïcode, too."
# case -> samples of each row: one conv frame odd or even, the shortest, a full window, one sample over, two windows
CASES = {"shortest": [321], "odd": [16080], "five_seconds": [80000], "full_window": [480000], "one_sample_over": [480001],
         "two_windows": [560123], "batch": [80000, 24161, 480001]}


def sound(samples: int, seed: int = 0) -> np.ndarray:
    """A gliding tone under noise, (samples,) float32 at 16 kHz."""
    t = np.arange(samples) / 16000
    noise = np.random.default_rng(seed + samples).standard_normal(samples)
    return (0.3 * np.sin(2 * np.pi * (300 + 200 * t) * t) * np.cos(t) ** 2 + 0.05 * noise).astype(np.float32)


def write_wav(path: Path, waveform: np.ndarray) -> Path:
    """16 bits, mono, 16 kHz."""
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes((np.clip(waveform, -1, 1) * 32767).astype("<i2").tobytes())
    return path


def conversation(waveform: np.ndarray, text: str = TEXT) -> list[dict]:
    return [{"role": "user", "content": [{"type": "text", "text": text}, {"type": "audio", "audio": waveform}]}]
