"""Synthetic sounds for tests, goldens and benchmarks, so that no recordings are needed."""

import wave
from pathlib import Path

import numpy as np

TEXT = "What sound is this? Ünïcode, too."

# The number of samples of each recording in a batch.
CASES = {
    "shortest": [321],
    "odd": [16080],  # an odd number of conv frames
    "five_seconds": [80000],
    "full_window": [480000],
    "one_sample_over": [480001],
    "two_windows": [560123],
    "batch": [80000, 24161, 480001],
}

# The same for Music Flamingo and Audio Flamingo Next. If the last window has no audio frame, as in
# "one_sample_over", transformers misassigns the windows for these models.
MUSIC_CASES = {
    "five_seconds": [80000],
    "full_window": [480000],
    "two_windows": [560123],
    "four_windows": [1500123],
    "batch": [80000, 24161, 1000000],
}


def sound(samples: int, seed: int = 0) -> np.ndarray:
    """Returns a gliding tone with noise: (samples,) float32 at 16 kHz."""
    seconds = np.arange(samples) / 16000
    tone = np.sin(2 * np.pi * (300 + 200 * seconds) * seconds) * np.cos(seconds) ** 2
    noise = np.random.default_rng(seed + samples).standard_normal(samples)
    return (0.3 * tone + 0.05 * noise).astype(np.float32)


def write_wav(path: Path, waveform: np.ndarray) -> Path:
    """Writes a WAV file: 16 bits, mono, 16 kHz."""
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes((np.clip(waveform, -1, 1) * 32767).astype("<i2").tobytes())
    return path


def conversation(waveform: np.ndarray, text: str = TEXT) -> list[dict]:
    content = [{"type": "text", "text": text}, {"type": "audio", "audio": waveform}]
    return [{"role": "user", "content": content}]


# A chat that the newer models' template can also format.
CHAT = [
    {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "audio", "path": "a"}]},
    {"role": "assistant", "content": "rain"},
    {"role": "user", "content": "Why?"},
]
