"""Audio files: a path in, a mono waveform at the wanted sampling rate out.

WAV files are read here. Other containers, and rarer kinds of WAV, go through the ffmpeg program.
"""

import math
import re
import struct
import subprocess
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# What ffmpeg may open. Playlists are not among them, because they can name other files.
FFMPEG_FORMATS = "mp3,flac,ogg,mov,matroska,avi,mpegts,aac,aiff,wav,w64,asf,caf,amr"

# Suffixes of the files that are taken from a folder of recordings.
AUDIO_SUFFIXES = {
    *(".wav", ".mp3", ".flac", ".ogg", ".oga", ".opus", ".m4a", ".aac", ".aif", ".aiff", ".w64"),
    *(".wma", ".caf", ".amr", ".mp4", ".m4v", ".mkv", ".webm", ".mov", ".avi", ".ts"),
}


def load_audio(path: str | Path, sampling_rate: int = 16000) -> np.ndarray:
    """A mono float32 waveform (n,) in [-1, 1] at `sampling_rate` Hz; channels are averaged.

    A truncated file gives the samples it has, with a warning. Raises FileNotFoundError or
    ValueError, naming the file.
    """
    path = Path(path)
    check_is_audio_file(path)
    decoded = None
    if is_wav(path):
        decoded = read_wav(path.read_bytes(), path)
    if decoded is None:
        decoded = read_wav(decode_with_ffmpeg(path), path)
    if decoded is None or len(decoded[1]) == 0:
        raise ValueError(f"{path}: no samples inside that can be read.")
    rate, samples = decoded
    mono = torch.from_numpy(samples).mean(1)
    return resample(mono, rate, sampling_rate).numpy()


def check_is_audio_file(path: Path) -> None:
    if path.is_file():
        return
    if path.exists():
        raise ValueError(f"{path}: a directory or device; a sound file is expected.")
    raise FileNotFoundError(f"{path}: no such file; a sound file is expected.")


# ---- WAV ----

PCM = 1
FLOAT = 3
EXTENSIBLE = 0xFFFE  # the real code comes later in the header

# numpy's type for a sample, by the header's code and bits.
SAMPLE_TYPES = {
    (PCM, 8): "u1",
    (PCM, 16): "<i2",
    (PCM, 24): "3u1",
    (PCM, 32): "<i4",
    (FLOAT, 32): "<f4",
    (FLOAT, 64): "<f8",
}

# A program that writes a WAV into a pipe cannot go back to fill in the size. It leaves about 4 GB.
UNKNOWN_SIZE = 0xFFFFFF00


def is_wav(path: Path) -> bool:
    with open(path, "rb") as file:
        return re.fullmatch(b"RIFF.{4}WAVE", file.read(12), re.DOTALL) is not None


def read_wav(content: bytes, path: Path) -> tuple[int, np.ndarray] | None:
    """(sampling rate in Hz, float32 samples (n, channels)) from a WAV file's bytes.

    None if the file is of a kind that ffmpeg has to read. `path` is for the warning only.
    """
    chunks = find_chunks(content)
    start, size = chunks.get(b"fmt ", (0, 0))
    if size < 16 or b"data" not in chunks:
        return None
    code, channels, rate, _, frame_bytes, bits = struct.unpack_from("<HHIIHH", content, start)
    if code == EXTENSIBLE and size >= 40:
        (code,) = struct.unpack_from("<H", content, start + 24)
    if (code, bits) not in SAMPLE_TYPES or frame_bytes != channels * bits // 8:
        return None
    if channels == 0 or not 1000 <= rate <= 768000:
        return None

    start, size = chunks[b"data"]
    available = min(size, len(content) - start)
    if available < size < UNKNOWN_SIZE:
        bytes_per_second = frame_bytes * rate
        warnings.warn(
            f"{path}: cut off, {available / bytes_per_second:.1f} s of "
            f"{size / bytes_per_second:.1f} s are there."
        )
    count = available // frame_bytes * channels
    samples = np.frombuffer(content, SAMPLE_TYPES[code, bits], count, start)
    if bits == 24:
        # A zero byte below the three makes them the upper bytes of a 32-bit integer.
        samples = np.pad(samples, ((0, 0), (1, 0))).view("<i4")
    return rate, to_float32(samples).reshape(-1, channels)


def find_chunks(content: bytes) -> dict[bytes, tuple[int, int]]:
    """(start, size) of each chunk of a WAV file, by name, up to the first with samples."""
    chunks = {}
    position = 12  # after RIFF, size, WAVE
    while position + 8 <= len(content) and b"data" not in chunks:
        name, size = struct.unpack_from("<4sI", content, position)
        chunks.setdefault(name, (position + 8, size))
        position += 8 + size + size % 2  # chunks are padded to an even size
    return chunks


@np.errstate(over="ignore")  # a float64 too large for float32 becomes infinity
def to_float32(samples: np.ndarray) -> np.ndarray:
    """float32 samples; integers are scaled by their type's range to [-1, 1)."""
    if samples.dtype.kind == "f":
        return samples.astype(np.float32)
    half_range = 2.0 ** (8 * samples.itemsize - 1)
    centred = samples.astype(np.float64)
    if samples.dtype.kind == "u":
        centred -= half_range
    return (centred / half_range).astype(np.float32)


# ---- Other containers ----


def decode_with_ffmpeg(path: Path) -> bytes:
    """The first audio stream of a file as a WAV of float samples, at its own rate and channels."""
    command = ["ffmpeg", "-nostdin", "-v", "error"]
    command += ["-protocol_whitelist", "file", "-format_whitelist", FFMPEG_FORMATS]
    command += ["-i", f"file:{path.absolute()}", "-map", "0:a:0"]
    command += ["-f", "wav", "-c:a", "pcm_f32le", "-"]
    try:
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
    except FileNotFoundError:
        raise ValueError(
            f"{path}: not a plain WAV file, and ffmpeg, which reads the others, is not installed."
        ) from None
    errors = result.stderr.decode(errors="replace").strip().splitlines()
    reason = errors[0] if errors else "no audio inside"
    if len(result.stdout) < 44:  # not even a WAV header
        raise ValueError(f"{path}: no audio that ffmpeg can read ({reason}).")
    if errors:  # ffmpeg's status is 0 for a truncated file
        warnings.warn(f"{path}: read as far as possible ({reason}).")
    return result.stdout


# ---- Resampling ----


def resample(waveform: Tensor, rate: int, target: int) -> Tensor:
    """A waveform (n,) at `rate` Hz as one of (ceil(n * target / rate),) at `target` Hz.

    The spectrum of the whole recording is cut off at the lower of the two Nyquist frequencies, or
    padded with zeros, and transformed back at the new length. Nothing is delayed.
    """
    if rate == target:
        return waveform
    # Every `down` samples become `up`. For a rate that nobody uses, the fraction is within 6e-6.
    up, down = Fraction(target, rate).limit_denominator(2000).as_integer_ratio()
    num_blocks = fft_block_count(len(waveform), up, down)

    spectrum = torch.fft.rfft(waveform, n=num_blocks * down)
    num_bins = num_blocks * min(up, down) // 2 + 1  # up to the lower Nyquist frequency
    spectrum = spectrum[:num_bins] * taper(num_bins)
    resampled = torch.fft.irfft(spectrum, n=num_blocks * up) * (up / down)
    return resampled[: math.ceil(len(waveform) * target / rate)]


def fft_block_count(samples: int, up: int, down: int) -> int:
    """How many blocks of `down` samples to transform: all of them, and silence at the end.

    The transform is circular. At least 256 samples of silence keep the end of the recording from
    ringing at its beginning. A multiple of a large power of two makes the FFT fast.
    """
    needed = samples // down + 256 // min(up, down)
    step = 1 << max(0, (samples // down).bit_length() - 4)
    return (needed // step + 2) * step


def taper(num_bins: int) -> Tensor:
    """1 for the lower 94% of the bins, then down to 0 along a cosine: a sharp edge would ring."""
    position = torch.linspace(-0.94, 0.06, num_bins).clamp(min=0)
    return torch.cos(position * math.pi / 0.12).square()
