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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from plumbing.check_inputs import check_finite_samples, check_samples

# The formats that ffmpeg may open. Playlists are excluded because they can refer to other files.
FFMPEG_FORMATS = "mp3,flac,ogg,mov,matroska,avi,mpegts,mpeg,flv,aac,aiff,wav,w64,asf,caf,amr,au,wv"

# A folder of recordings is searched for files with these suffixes.
AUDIO_SUFFIXES = {
    *(".wav", ".mp3", ".flac", ".ogg", ".oga", ".opus", ".m4a", ".aac", ".aif", ".aiff", ".w64"),
    *(
        ".au",
        ".wv",
        ".wma",
        ".caf",
        ".amr",
        ".mp4",
        ".m4v",
        ".mkv",
        ".webm",
        ".mov",
        ".avi",
        ".flv",
    ),
    *(".mpg", ".mpeg", ".ts"),
}


def load_audio(
    path: str | Path, sampling_rate: int = 16000, max_seconds: float | None = None
) -> np.ndarray:
    """Returns a mono float32 waveform (n,) in [-1, 1] at `sampling_rate` Hz; averages channels.

    Reads at most `max_seconds` and warns if the recording is longer. A truncated file yields the
    samples it has, with a warning. Raises FileNotFoundError or ValueError; the message contains
    the file name.
    """
    check_is_no_url(str(path))
    path = Path(path)
    check_is_audio_file(path)
    waveform = None
    with one_thread():
        if is_wav(path):
            with open(path, "rb") as file:
                waveform = read_wav(file, path, sampling_rate, max_seconds)
        if waveform is None:
            waveform = read_with_ffmpeg(path, sampling_rate, max_seconds)
    if waveform is None or len(waveform) == 0:
        raise ValueError(f"{path}: no readable samples inside.")
    return waveform.numpy()


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside this context, PyTorch computes on one thread.

    On an idle machine, two threads resample a sixth faster. With two other busy programs they
    wait for each other: ten minutes at 44.1 kHz take 4 to 13 s on two threads, and 2 s on one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def load_waveform(
    audio, name: str, sampling_rate: int, max_samples: int, min_samples: int
) -> Tensor:
    """The float32 waveform (n,) of a file, or of 1-D samples at `sampling_rate` Hz.

    Samples are an array, a tensor or a list; integers are scaled by their type's range. What is
    longer than max_samples is cut, with a warning. `name` is for errors where there is no file.
    """
    if isinstance(audio, (str, Path)):
        name = str(audio)
        audio = load_audio(audio, sampling_rate, max_samples / sampling_rate)
    samples = as_array(audio)
    check_samples(samples, name, min_samples)
    samples = to_float32(samples)
    check_finite_samples(samples, name)
    if len(samples) > max_samples:
        warn_about_length(len(samples) / sampling_rate, max_samples / sampling_rate)
    return torch.from_numpy(samples[:max_samples])


def as_array(audio) -> np.ndarray:
    if isinstance(audio, np.ndarray):
        return audio
    if isinstance(audio, Tensor):
        audio = audio.detach().cpu()
        return audio.float().numpy() if audio.is_floating_point() else audio.numpy()
    return np.asarray(audio, dtype=np.float32)


def warn_about_length(seconds: float, max_seconds: float) -> None:
    warnings.warn(f"{seconds:.1f} s of audio: only the first {max_seconds:.1f} s are heard")


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

    Errors and warnings say "standard input" in place of the name of this file.
    """
    if sys.stdin is None:
        raise ValueError("Standard input is closed; a recording is expected there.")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "recording")
        with open(path, "wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        try:
            with warnings.catch_warnings(record=True) as caught:
                yield path
        except ValueError as error:
            raise ValueError(str(error).replace(path, "standard input")) from None
    for warning in caught:
        warnings.warn(str(warning.message).replace(path, "standard input"))


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
# says about 4 GB, or 0, as it also does if the program is killed while recording.
UNKNOWN_SIZE = 0xFFFFFF00


def is_wav(path: Path) -> bool:
    with open(path, "rb") as file:
        return re.fullmatch(b"RIFF.{4}WAVE", file.read(12), re.DOTALL) is not None


PART_SECONDS = 10  # read and resample this much at a time, so that memory use stays small


def read_wav(
    file: BinaryIO, path: Path, sampling_rate: int, max_seconds: float | None
) -> Tensor | None:
    """Returns the waveform of a WAV file, as `load_audio` does.

    Returns None for a WAV format that ffmpeg has to read. `path` is only for warnings and errors.
    """
    header = read_header(file)
    if header is None:
        return None
    check_rate(header.rate, path)
    parts = WavParts(file, header, max_seconds)
    # Read all parts first: resampling in between would keep ffmpeg waiting.
    resampled = resample_parts(list(parts), header.rate, sampling_rate)
    waveform = torch.cat([*resampled, torch.zeros(0)])
    if parts.is_cut_off():
        warnings.warn(
            f"{path}: truncated: only {parts.seconds_read():.1f} s of {header.seconds():.1f} s "
            "are present."
        )
    if max_seconds is not None and parts.seconds_read() > max_seconds:
        seconds = header.seconds() if header.size_is_known() else duration_by_ffmpeg(path)
        warn_about_length(max(seconds, parts.seconds_read()), max_seconds)
        waveform = waveform[: round(max_seconds * sampling_rate)].clone()  # frees the rest
    return waveform


class WavParts:
    """Iterates over a WAV file in mono parts of PART_SECONDS; only the last may be shorter."""

    def __init__(self, file: BinaryIO, header: "Header", max_seconds: float | None):
        self.file = file
        self.header = header
        self.bytes_read = 0
        self.bytes_wanted = header.data_size
        if max_seconds is not None:
            # Read one second more than needed, so that the end is resampled like the rest.
            longest = math.ceil(max_seconds + MARGIN_SECONDS) * header.bytes_per_second()
            self.bytes_wanted = min(header.data_size, longest)

    def __iter__(self) -> Iterator[Tensor]:
        part_bytes = PART_SECONDS * self.header.bytes_per_second()
        while self.bytes_read < self.bytes_wanted:
            content = self.file.read(min(part_bytes, self.bytes_wanted - self.bytes_read))
            if not content:
                return
            self.bytes_read += len(content)
            yield to_mono(content, self.header)

    def seconds_read(self) -> float:
        return self.bytes_read / self.header.bytes_per_second()

    def is_cut_off(self) -> bool:
        return self.header.size_is_known() and self.bytes_read < self.bytes_wanted


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
        return self.data_size < UNKNOWN_SIZE


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


def to_mono(content: bytes, header: Header) -> Tensor:
    """Returns the mean of the channels, float32 (n,). Drops an incomplete last frame."""
    count = len(content) // header.frame_bytes * header.channels
    samples = np.frombuffer(content, header.sample_type, count)
    if header.sample_type == "3u1":
        # With a zero byte below them, the three become the upper bytes of a 32-bit integer.
        samples = np.pad(samples, ((0, 0), (1, 0))).view("<i4")
    channels = to_float32(samples).reshape(-1, header.channels)
    weights = torch.full((header.channels,), 1 / header.channels)
    return torch.from_numpy(channels) @ weights  # .mean(1) takes ten times as long


@np.errstate(over="ignore")  # a float64 too large for float32 becomes infinity
def to_float32(samples: np.ndarray) -> np.ndarray:
    """Converts samples to float32; integers are scaled by the range of their type to [-1, 1)."""
    if samples.dtype.kind == "f":
        return samples.astype(np.float32)
    half_range = 2.0 ** (8 * samples.itemsize - 1)
    if samples.dtype.kind == "u":
        samples = samples - half_range  # float64
    return samples.astype(np.float32) / np.float32(half_range)


# ---- Other containers ----


def read_with_ffmpeg(path: Path, sampling_rate: int, max_seconds: float | None) -> Tensor | None:
    """Returns the waveform of the first audio stream of a file, as `load_audio` does."""
    command = ["ffmpeg", "-nostdin", "-v", "error"]
    if max_seconds is not None:
        command += ["-t", str(math.ceil(max_seconds + MARGIN_SECONDS))]
    command += [*ffmpeg_input(path), "-map", "0:a:0", "-f", "wav", "-c:a", "pcm_f32le", "-"]
    with tempfile.TemporaryFile() as messages:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=messages,
                start_new_session=True,  # Ctrl-C reaches only this program, which then stops ffmpeg
            )
        except FileNotFoundError:
            raise ValueError(
                f"{path}: not a plain WAV file, and ffmpeg, which reads other formats, "
                "is not installed."
            ) from None
        except OSError as error:
            raise ValueError(f"{path}: ffmpeg cannot be run ({error.strerror}).") from None
        with process:
            waveform = read_wav(process.stdout, path, sampling_rate, max_seconds)
        messages.seek(0)
        # Decoded like the path, so that it can be found: its name may not be UTF-8.
        text = messages.read().decode(sys.getfilesystemencoding(), errors="surrogateescape")
        errors = text.replace(f"file:{path.absolute()}: ", "").strip().splitlines()
    reason = "no audio inside"
    if process.returncode != 0:  # negative if a signal killed it
        reason = f"ffmpeg ended with status {process.returncode}"
    if errors:
        reason = explain_ffmpeg(errors[0])
    if waveform is None:
        raise ValueError(f"{path}: no audio that ffmpeg can read ({reason}).")
    if errors or process.returncode != 0:  # the status is 0 for a truncated file
        warnings.warn(f"{path}: read as far as possible ({reason}).")
    return waveform


def explain_ffmpeg(message: str) -> str:
    """Returns ffmpeg's message, or a plainer one where a user could not understand it."""
    if "matches no streams" in message:
        return "it has video, but no audio"
    if "not on whitelist" in message:
        return "a playlist or a rare kind of file; convert it to WAV first"
    return re.sub(r" @ 0x[0-9a-f]+", "", message)  # addresses in ffmpeg's memory


def ffmpeg_input(path: Path) -> list[str]:
    """Returns the arguments that let ffmpeg open this file, and no other that it refers to."""
    options = ["-protocol_whitelist", "file", "-format_whitelist", FFMPEG_FORMATS]
    return [*options, "-i", f"file:{path.absolute()}"]


def duration_by_ffmpeg(path: Path) -> float:
    """Returns the duration in seconds that the file declares; 0 if it declares none."""
    command = ["ffmpeg", "-nostdin", *ffmpeg_input(path)]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
    duration = re.search(rb"Duration: (\d+):(\d+):([\d.]+)", result.stderr)
    if duration is None:
        return 0.0
    hours, minutes, seconds = duration.groups()
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)


# ---- Resampling ----


MARGIN_SECONDS = 1  # of each neighboring part, resampled along; longer than the filter's reach


def resample(waveform: Tensor, rate: int, target: int) -> Tensor:
    """Resamples (n,) at `rate` Hz to (ceil(n * target / rate),) at `target` Hz."""
    parts = waveform.split(PART_SECONDS * rate)
    return torch.cat(list(resample_parts(parts, rate, target)))


def resample_parts(parts: Iterable[Tensor], rate: int, target: int) -> Iterator[Tensor]:
    """Resamples parts as one recording. All parts but the last must be whole seconds long."""
    if rate == target:
        yield from parts
        return
    margin = MARGIN_SECONDS * rate
    nothing = torch.zeros(0)
    before = nothing
    part = None
    for following in chain(parts, [nothing]):
        if part is not None:
            piece = torch.cat([before, part, following[:margin]])
            resampled = resample_piece(piece, rate, target)
            first = len(before) * target // rate
            yield resampled[first : first + math.ceil(len(part) * target / rate)]
            before = part[-margin:]
        part = following


def resample_piece(waveform: Tensor, rate: int, target: int) -> Tensor:
    """Resamples a waveform by one FFT.

    The spectrum is cut off at the lower of the two Nyquist frequencies, or padded with zeros, and
    transformed back at the new length. The result has no delay.
    """
    # Every `down` samples become `up`. For unusual rates the fraction is accurate to 6e-6.
    up, down = Fraction(target, rate).limit_denominator(2000).as_integer_ratio()
    num_blocks = fft_block_count(len(waveform), up, down)

    spectrum = torch.fft.rfft(waveform, n=num_blocks * down)
    num_bins = num_blocks * min(up, down) // 2 + 1  # up to the lower Nyquist frequency
    spectrum = spectrum[:num_bins] * taper(num_bins)
    resampled = torch.fft.irfft(spectrum, n=num_blocks * up) * (up / down)
    return resampled[: math.ceil(len(waveform) * target / rate)]


def fft_block_count(samples: int, up: int, down: int) -> int:
    """Returns how many blocks of `down` samples to transform: the waveform and silence after it.

    The transform is circular. At least 256 samples of silence keep the end of the recording from
    ringing at its beginning. The count is a multiple of a large power of two, for a fast FFT.
    """
    needed = samples // down + 256 // min(up, down)
    step = 1 << max(0, (samples // down).bit_length() - 4)
    return (needed // step + 2) * step


def taper(num_bins: int) -> Tensor:
    """1 for the lower 94% of the bins, then a cosine down to 0, because a sharp edge would ring."""
    position = torch.linspace(-0.94, 0.06, num_bins).clamp(min=0)
    return torch.cos(position * math.pi / 0.12).square()
