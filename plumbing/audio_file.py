"""Audio files: a path in, a mono waveform at the requested sampling rate out.

Common WAV files are decoded here. Other containers and rarer WAV formats are decoded by ffmpeg.
"""

import math
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, takewhile
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from plumbing.check_inputs import check_finite_samples, check_samples
from plumbing.joined_file import are_about_joints
from plumbing.media_file import Media, Track, errors_of_starting, ffmpeg_input, probe

# A folder of recordings is searched for files with these suffixes.
AUDIO_SUFFIXES = frozenset(
    """
    .wav .wave .bwf .w64 .aif .aiff .aifc .au .snd .caf
    .mp3 .mp2 .mpa .aac .adts .ac3 .eac3 .flac .ogg .oga .opus .spx .wv .wma .amr .awb
    .m4a .m4b .m4r .mp4 .m4v .mov .qt .3gp .3g2 .3ga .f4v .mka .mkv .weba .webm .ogv .avi .flv
    .wmv .asf .mpg .mpeg .vob .ts .mts .m2ts
    """.split()
)

Warn = Callable[[str], None]


def load_audio(
    path: str | Path,
    sampling_rate: int = 16000,
    max_seconds: float | None = None,
    warn: Warn = warnings.warn,
) -> np.ndarray:
    """Returns a mono float32 waveform (n,) in [-1, 1] at `sampling_rate` Hz; averages channels.

    Reads at most `max_seconds` and warns if the recording is longer. A truncated file yields the
    samples it has, with a warning. Of several audio tracks, reads the default one; where it has
    no sound, nothing is inserted (see `plumbing/timeline.py`). `warn` is called with each warning.
    Raises FileNotFoundError or ValueError; the message contains the file name.
    """
    check_is_no_url(str(path))
    path = Path(path)
    check_is_audio_file(path)
    recording = None
    if is_wav(path):
        recording = read_wav_file(path, max_seconds, warn)
    if recording is None:
        recording = read_with_ffmpeg(path, max_seconds, warn)
    if recording.seconds() == 0:
        raise ValueError(f"{path}: no readable samples inside.")
    waveform = np.concatenate(list(resample_parts(recording.parts, recording.rate, sampling_rate)))
    if max_seconds is not None and recording.seconds() > max_seconds:
        warn_about_length(max(recording.declared, recording.seconds()), max_seconds, warn)
        waveform = waveform[: round(max_seconds * sampling_rate)].copy()  # frees the rest
    if recording.sound.cancels():
        kept = f"{recording.sound.share_kept():.0%}"
        warn(
            f"{path}: its channels cancel each other: their mean keeps {kept} of their energy; "
            "extract one of them."
        )
    elif recording.sound.is_silent():
        warn(f"{path}: {SILENCE}")
    return waveform


def load_waveform(
    audio,
    name: str,
    sampling_rate: int,
    max_samples: int,
    min_samples: int,
    warn: Warn = warnings.warn,
) -> Tensor:
    """The float32 waveform (n,) of a file, or of 1-D samples at `sampling_rate` Hz.

    Samples are an array, a tensor or a list; integers are scaled by their type's range. What is
    longer than max_samples is cut, with a warning. `name` is for errors where there is no file.
    `warn` is called with each warning.
    """
    was_checked = getattr(audio, "silence_was_checked", False)
    if isinstance(audio, (str, Path)):
        name = str(audio)
        audio = load_audio(audio, sampling_rate, max_samples / sampling_rate, warn)
        was_checked = True
    samples = as_array(audio)
    check_samples(samples, name, min_samples)
    samples = to_float32(samples)
    check_finite_samples(samples, name)
    if len(samples) > max_samples:
        warn_about_length(len(samples) / sampling_rate, max_samples / sampling_rate, warn)
    samples = samples[:max_samples]
    if not was_checked and is_silent(samples):
        warn(f"{name}: {SILENCE}")
    waveform = torch.from_numpy(samples)
    waveform.silence_was_checked = True  # so that nobody is warned twice
    return waveform


def as_array(audio) -> np.ndarray:
    if isinstance(audio, np.ndarray):
        return audio
    if isinstance(audio, Tensor):
        audio = audio.detach().cpu()
        return audio.float().numpy() if audio.is_floating_point() else audio.numpy()
    return np.asarray(audio, dtype=np.float32)


def warn_about_length(seconds: float, max_seconds: float, warn: Warn) -> None:
    warn(f"{seconds:.1f} s of audio: only the first {max_seconds:.1f} s are heard")


def check_is_no_url(name: str, place: str = "") -> None:
    """`place` says where the name was found; the error message starts with it."""
    # A Path has lost one of the two slashes.
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+:/{1,2}\S+$", name) and not os.path.exists(name):
        raise ValueError(f"{place}{name}: a URL; only files are read, so download it first.")


def check_is_audio_file(path: Path) -> None:
    if path.is_file():
        if path.stat().st_size == 0:
            raise ValueError(f"{path}: an empty file; a sound file is expected.")
        return
    if path.exists():
        raise ValueError(
            f"{path}: a directory, pipe or device; a sound file is expected. "
            "A recording in a pipe is read as -, the standard input."
        )
    raise FileNotFoundError(f"{path}: no such file; a sound file is expected.")


@contextmanager
def stdin_as_file() -> Iterator[str]:
    """Copies standard input to a temporary file, because ffmpeg must be able to seek in it.

    Errors say "standard input" in place of the name of this file.
    """
    if sys.stdin is None:
        raise ValueError("Standard input is closed; a recording is expected there.")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "recording")
        with open(path, "wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        try:
            yield path
        except ValueError as error:
            raise ValueError(str(error).replace(path, "standard input")) from None


# ---- WAV ----

PCM = 1
FLOAT = 3
EXTENSIBLE = 0xFFFE  # the actual format code comes later in the header

# numpy's type for a sample, by the header's format code and bits per sample.
SAMPLE_TYPES = {
    (PCM, 8): "u1",
    (PCM, 16): "<i2",
    (PCM, 24): "3u1",
    (PCM, 32): "<i4",
    (FLOAT, 32): "<f4",
    (FLOAT, 64): "<f8",
}

# A program that writes a WAV file to a pipe cannot go back to fill in the size. The header then
# says about 4 GB, about 2 GB, or 0, as it also does if the program is killed while recording.
UNKNOWN_SIZE = 0xFFFFFF00
UNKNOWN_SIZES_OF_2_GB = range(0x7FFF0000, 0x80000001)


def is_wav(path: Path) -> bool:
    with open(path, "rb") as file:
        return re.fullmatch(b"RIFF.{4}WAVE", file.read(12), re.DOTALL) is not None


PART_SECONDS = 10  # read and resample this much at a time, so that memory use stays small


@dataclass
class Recording:
    """The mono samples of a file at the file's own sampling rate."""

    parts: list[np.ndarray]  # of PART_SECONDS; only the last may be shorter
    rate: int  # Hz
    declared: float  # the duration in seconds that the file declares; 0 if it declares none
    sound: "SoundCheck"

    def seconds(self) -> float:
        return sum(len(part) for part in self.parts) / self.rate


def read_wav_file(path: Path, max_seconds: float | None, warn: Warn) -> Recording | None:
    """Reads a WAV file. Returns None for a format that ffmpeg has to read."""
    with open(path, "rb") as file:
        parts = open_wav(file, path, max_seconds)
        if parts is None:
            return None
        recording = parts.read()
        if parts.is_cut_off():
            warn(
                f"{path}: truncated: only {parts.seconds_read():.1f} s of "
                f"{recording.declared:.1f} s are present."
            )
        if not parts.header.size_is_known():
            size = os.path.getsize(path)
            recording.declared = size / parts.header.bytes_per_second()
        elif parts.is_at_end():
            rest = what_follows(file, parts.header)
            if rest:
                warn(f"{path}: {rest} follows after {recording.declared:.1f} s; it is not read.")
    return recording


def open_wav(file: BinaryIO, path: Path, max_seconds: float | None) -> "WavParts | None":
    """Reads a WAV file up to its first sample. `path` is for errors."""
    header = read_header(file)
    if header is None:
        return None
    check_rate(header.rate, path)
    return WavParts(file, header, max_seconds)


class WavParts:
    """Iterates over a WAV file in mono parts of PART_SECONDS; only the last may be shorter."""

    def __init__(self, file: BinaryIO, header: "Header", max_seconds: float | None):
        self.file = file
        self.header = header
        self.sound = SoundCheck()
        self.bytes_read = 0
        self.bytes_wanted = header.data_size
        if max_seconds is not None:
            # Read one second more than needed, so that the end is resampled like the rest.
            longest = math.ceil(max_seconds + MARGIN_SECONDS) * header.bytes_per_second()
            self.bytes_wanted = min(header.data_size, longest)

    def read(self) -> Recording:
        # Read all parts first: resampling in between would keep ffmpeg waiting.
        parts = list(self)
        declared = self.header.seconds() if self.header.size_is_known() else 0.0
        return Recording(parts, self.header.rate, declared, self.sound)

    def __iter__(self) -> Iterator[np.ndarray]:
        part_bytes = PART_SECONDS * self.header.bytes_per_second()
        while self.bytes_read < self.bytes_wanted:
            content = self.file.read(min(part_bytes, self.bytes_wanted - self.bytes_read))
            if not content:
                return
            self.bytes_read += len(content)
            channels = decode_samples(content, self.header)
            mono = to_mono(channels)
            self.sound.add(channels, mono)
            yield mono

    def seconds_read(self) -> float:
        return self.bytes_read / self.header.bytes_per_second()

    def is_cut_off(self) -> bool:
        return self.header.size_is_known() and self.bytes_read < self.bytes_wanted

    def has_read_enough(self) -> bool:
        """Whether the reader stopped, although there may be more."""
        return self.bytes_read == self.bytes_wanted < self.header.data_size

    def is_at_end(self) -> bool:
        return self.bytes_read == self.header.data_size


@dataclass
class Header:
    rate: int  # Hz
    channels: int
    sample_type: str  # numpy's
    frame_bytes: int  # bytes of one sample of every channel
    data_size: int  # bytes of all samples

    def bytes_per_second(self) -> int:
        return self.frame_bytes * self.rate

    def seconds(self) -> float:
        return self.data_size / self.bytes_per_second()

    def size_is_known(self) -> bool:
        return self.data_size < UNKNOWN_SIZE and self.data_size not in UNKNOWN_SIZES_OF_2_GB


def read_header(file: BinaryIO) -> Header | None:
    """Reads a WAV file up to its first sample. Returns None for a format not supported here."""
    file.read(12)  # RIFF, size, WAVE
    sample_format = b""
    while True:
        chunk = file.read(8)
        if len(chunk) < 8:
            return None
        name, size = struct.unpack("<4sI", chunk)
        if name == b"data":
            break
        if name == b"fmt " and not sample_format:
            sample_format = file.read(min(size, 40))
            size -= len(sample_format)
        skip(file, size + size % 2)  # chunks are padded to an even size
    if len(sample_format) < 16:
        return None
    code, channels, rate, _, frame_bytes, bits = struct.unpack_from("<HHIIHH", sample_format)
    if code == EXTENSIBLE and len(sample_format) >= 40:
        (code,) = struct.unpack_from("<H", sample_format, 24)
    if (code, bits) not in SAMPLE_TYPES or frame_bytes != channels * bits // 8:
        return None
    if channels == 0:
        return None
    return Header(rate, channels, SAMPLE_TYPES[code, bits], frame_bytes, size or UNKNOWN_SIZE)


def check_rate(rate: int, path: Path) -> None:
    if not 1000 <= rate <= 768000:
        raise ValueError(f"{path}: a sampling rate of {rate} Hz; 1000 to 768000 Hz are expected.")


def skip(file: BinaryIO, count: int) -> None:
    """Skips `count` bytes by reading them, because a pipe cannot seek."""
    while count > 0:
        part = file.read(min(count, 1 << 20))
        if not part:
            return
        count -= len(part)


def what_follows(file: BinaryIO, header: Header) -> str:
    """What comes after the samples that the header announces; "" if it is no sound."""
    skip(file, header.data_size % 2)
    while True:
        chunk = file.read(8)
        if len(chunk) < 8:
            return ""
        name, size = struct.unpack("<4sI", chunk)
        if name in (b"data", b"RIFF") and size > 0:
            return "another recording"
        if not (name.isascii() and name.decode().isprintable()):
            is_long = len(file.read(header.bytes_per_second())) == header.bytes_per_second()
            return "more sound than the header announces" if is_long else ""
        skip(file, size + size % 2)


def decode_samples(content: bytes, header: Header) -> np.ndarray:
    """Returns float32 (n, channels). Drops an incomplete last frame."""
    count = len(content) // header.frame_bytes * header.channels
    samples = np.frombuffer(content, header.sample_type, count)
    if header.sample_type == "3u1":
        # With a zero byte below them, the three become the upper bytes of a 32-bit integer.
        samples = np.pad(samples, ((0, 0), (1, 0))).view("<i4")
    return to_float32(samples).reshape(-1, header.channels)


def to_mono(channels: np.ndarray) -> np.ndarray:
    """Returns the mean of the channels (n, channels), float32 (n,)."""
    count = channels.shape[1]
    weights = np.full(count, 1 / count, np.float32)
    return np.einsum("nc,c->n", channels, weights)  # .mean(1) takes four times as long


@np.errstate(over="ignore")  # a float64 too large for float32 becomes infinity
def to_float32(samples: np.ndarray) -> np.ndarray:
    """Converts samples to float32; integers are scaled by the range of their type to [-1, 1)."""
    if samples.dtype.kind == "f":
        return samples.astype(np.float32)
    half_range = 2.0 ** (8 * samples.itemsize - 1)
    if samples.dtype.kind == "u":
        samples = samples - half_range  # float64
    return samples.astype(np.float32) / np.float32(half_range)


# ---- Silence ----

# Samples that differ by no more than this are silence: one step of 16 bits up or down, as in the
# noise that is added before rounding. The noise of a microphone is usually louder.
SILENT_RANGE = 2 * 2.0**-15
SILENCE = "silence: its samples hardly differ; check how it was recorded."

# The mean of channels keeps at least this share of their energy, or else they cancel each other.
# Two different sounds keep a half, and one channel of eight an eighth. A sound and its negative
# keep nothing, or the noise of a codec.
LEAST_KEPT = 0.05


def is_silent(samples: np.ndarray) -> bool:
    return float(samples.max()) - float(samples.min()) <= SILENT_RANGE


class SoundCheck:
    """Notices, part by part, whether a recording is silent, or only the mean of its channels."""

    def __init__(self):
        self.lowest = math.inf
        self.highest = -math.inf
        self.num_samples = 0
        self.energy = 0.0  # of the mean of the channels
        self.energy_of_channels = 0.0  # the mean of theirs

    @np.errstate(over="ignore", invalid="ignore")  # samples may be infinite
    def add(self, channels: np.ndarray, mono: np.ndarray) -> None:
        """channels: (n, channels). mono: their mean (n,)"""
        if len(mono) == 0:
            return
        self.lowest = min(self.lowest, float(mono.min()))
        self.highest = max(self.highest, float(mono.max()))
        self.num_samples += len(mono)
        self.energy += float(np.einsum("n,n->", mono, mono))
        of_all = float(np.einsum("nc,nc->", channels, channels))
        self.energy_of_channels += of_all / channels.shape[1]

    def is_silent(self) -> bool:
        return self.highest - self.lowest <= SILENT_RANGE

    def cancels(self) -> bool:
        """Whether the channels have a sound that their mean has lost."""
        is_heard = self.energy_of_channels > self.num_samples * SILENT_RANGE**2
        return is_heard and self.share_kept() < LEAST_KEPT

    def share_kept(self) -> float:
        return self.energy / self.energy_of_channels


# ---- Other containers ----


def read_with_ffmpeg(path: Path, max_seconds: float | None, warn: Warn) -> Recording:
    """Reads the default audio track of a file, or the first; if it is empty, another."""
    media = probe(path)
    for track in media.tracks or [Track("0:a:0", number=1)]:
        recording, complaints = decode(path, track, media, max_seconds)
        if recording is not None and recording.seconds() > 0:
            break
    reason = explain_ffmpeg(complaints[0] if complaints else "no audio inside")
    if recording is None:
        raise ValueError(f"{path}: no audio that ffmpeg can read ({reason}).")
    if len(media.tracks) > 1 and recording.seconds() > 0:
        chosen = ", the default one," if track.is_default else ""
        warn(f"{path}: {len(media.tracks)} audio tracks; number {track.number}{chosen} is read.")
    if complaints and not are_about_joints(complaints, path):
        warn(f"{path}: read as far as possible ({reason}).")
    recording.declared = media.duration
    return recording


def decode(
    path: Path, track: Track, media: Media, max_seconds: float | None
) -> tuple[Recording | None, list[str]]:
    """Returns the recording, or None if there is none, and what ffmpeg complains about."""
    command = ["ffmpeg", "-nostdin", "-v", "repeat+error"]
    if max_seconds is not None and not media.has_times():  # or it would count gaps in the sound
        command += ["-t", str(math.ceil(max_seconds + MARGIN_SECONDS))]
    command += [*ffmpeg_input(path), "-map", track.stream, "-f", "wav", "-c:a", "pcm_f32le", "-"]
    recording = None
    with tempfile.TemporaryFile() as messages:
        with errors_of_starting(path):
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=messages,
                start_new_session=True,  # Ctrl-C reaches only this program, which then stops ffmpeg
            )
        with process:
            parts = open_wav(process.stdout, path, max_seconds)
            if parts is not None:
                recording = parts.read()
        messages.seek(0)
        complaints = os.fsdecode(messages.read()).replace(f"file:{path.absolute()}: ", "")
    complaints = complaints.strip().splitlines()
    if parts is not None and parts.has_read_enough():
        # ffmpeg may have been writing more, which it then reports last.
        return recording, list(takewhile(lambda line: "Broken pipe" not in line, complaints))
    if process.returncode != 0:  # negative if a signal killed it; 0 for a truncated file
        complaints.append(f"ffmpeg ended with status {process.returncode}")
    return recording, complaints


def explain_ffmpeg(message: str) -> str:
    """Returns ffmpeg's message, or a plainer one where a user could not understand it."""
    if "matches no streams" in message:
        return "it has video, but no audio"
    if "not on whitelist" in message:
        return "a playlist or a rare kind of file; convert it to WAV first"
    return re.sub(r" @ 0x[0-9a-f]+", "", message)  # addresses in ffmpeg's memory


# ---- Resampling ----

# By numpy, which uses one thread. PyTorch's threads are the caller's to set, and wait for each
# other beside two busy programs: ten minutes at 44.1 kHz take 4 to 30 s on two of them, 3 s here.

MARGIN_SECONDS = 1  # of each neighboring part, resampled along; longer than the filter's reach


def resample(waveform: np.ndarray, rate: int, target: int) -> np.ndarray:
    """Resamples (n,) at `rate` Hz to (ceil(n * target / rate),) at `target` Hz, float32."""
    length = PART_SECONDS * rate
    parts = [waveform[first : first + length] for first in range(0, len(waveform), length)]
    return np.concatenate(list(resample_parts(parts, rate, target)))


def resample_parts(parts: Iterable[np.ndarray], rate: int, target: int) -> Iterator[np.ndarray]:
    """Resamples parts as one recording. All parts but the last must be whole seconds long."""
    if rate == target:
        yield from parts
        return
    margin = MARGIN_SECONDS * rate
    nothing = np.zeros(0, np.float32)
    before = nothing
    part = None
    for following in chain(parts, [nothing]):
        if part is not None:
            piece = np.concatenate([before, part, following[:margin]])
            resampled = resample_piece(piece, rate, target)
            first = len(before) * target // rate
            yield resampled[first : first + math.ceil(len(part) * target / rate)]
            before = part[-margin:]
        part = following


def resample_piece(waveform: np.ndarray, rate: int, target: int) -> np.ndarray:
    """Resamples a waveform by one FFT.

    The spectrum is cut off at the lower of the two Nyquist frequencies, or padded with zeros, and
    transformed back at the new length. The result has no delay.
    """
    # Every `down` samples become `up`. For unusual rates the fraction is accurate to 6e-6.
    up, down = Fraction(target, rate).limit_denominator(2000).as_integer_ratio()
    num_blocks = fft_block_count(len(waveform), up, down)

    spectrum = np.fft.rfft(waveform, n=num_blocks * down)
    num_bins = num_blocks * min(up, down) // 2 + 1  # up to the lower Nyquist frequency
    spectrum = spectrum[:num_bins] * taper(num_bins)
    resampled = np.fft.irfft(spectrum, n=num_blocks * up) * np.float32(up / down)
    resampled = resampled.astype(np.float32, copy=False)  # float64 in numpy 1
    return resampled[: math.ceil(len(waveform) * target / rate)]


def fft_block_count(samples: int, up: int, down: int) -> int:
    """Returns how many blocks of `down` samples to transform: the waveform and silence after it.

    The transform is circular. At least 256 samples of silence keep the end of the recording from
    ringing at its beginning. The count is a multiple of a large power of two, for a fast FFT.
    """
    needed = samples // down + 256 // min(up, down)
    step = 1 << max(0, (samples // down).bit_length() - 4)
    return (needed // step + 2) * step


def taper(num_bins: int) -> np.ndarray:
    """1 for the lower 94% of the bins, then a cosine down to 0, because a sharp edge would ring."""
    position = np.linspace(-0.94, 0.06, num_bins, dtype=np.float32).clip(min=0)
    return np.cos(position * np.float32(math.pi / 0.12)) ** 2
