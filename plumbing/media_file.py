"""What ffmpeg knows about a file before it decodes it: duration, beginning, audio tracks."""

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# The formats that ffmpeg may open. Playlists are excluded because they can refer to other files.
FFMPEG_FORMATS = (
    "mp3,flac,ogg,mov,matroska,avi,mpegts,mpeg,flv,aac,ac3,eac3,aiff,wav,w64,asf,caf,amr,au,wv"
)

# Formats that give the time of each packet; in others, each sample follows the one before it.
FORMATS_WITH_TIMES = ("matroska", "mov", "avi", "mpeg", "flv", "asf", "ogg")

# These count from the beginning of the film; in others, a clock may start anywhere.
FORMATS_FROM_ZERO = ("matroska", "mov")


@dataclass
class Track:
    stream: str  # ffmpeg's name for it
    number: int  # among the audio tracks, from 1
    is_default: bool = False


@dataclass
class Media:
    format: str  # ffmpeg's names for it
    duration: float  # in seconds; 0 if the file declares none
    start: float  # the earliest time in the file, in seconds
    tracks: list[Track]  # the audio tracks; the one that players choose comes first

    def has_times(self) -> bool:
        return self.format.startswith(FORMATS_WITH_TIMES)

    def beginning(self) -> float:
        """The time in the file, in seconds, at which a player's clock shows 0."""
        if self.format.startswith(FORMATS_FROM_ZERO) and 0 < self.start < self.duration:
            return 0.0
        return self.start


def probe(path: Path) -> Media:
    """What ffmpeg says about a file; of an unreadable one, nothing.

    Raises ValueError if ffmpeg cannot be run.
    """
    command = ["ffmpeg", "-nostdin", *ffmpeg_input(path)]
    nothing = subprocess.DEVNULL
    with errors_of_starting(path):
        result = subprocess.run(
            command, stdin=nothing, stdout=nothing, stderr=subprocess.PIPE, start_new_session=True
        )
    text = result.stderr.decode(errors="replace")
    name = re.search(r"^Input #0, (\S+), from ", text, re.MULTILINE)
    duration = re.search(r"^  Duration: (\d+):(\d+):([\d.]+)", text, re.MULTILINE)
    start = re.search(r"^  Duration: .*, start: (-?[\d.]+)", text, re.MULTILINE)
    seconds = 0.0
    if duration is not None:
        hours, minutes, rest = duration.groups()
        seconds = 3600 * int(hours) + 60 * int(minutes) + float(rest)
    return Media(
        format=name[1] if name else "",
        duration=seconds,
        start=float(start[1]) if start else 0.0,
        tracks=audio_tracks(text),
    )


def audio_tracks(text: str) -> list[Track]:
    """The audio tracks in ffmpeg's description of a file, the first default one before the others.

    In a Transport Stream, which consists of programs, they may be listed out of order.
    """
    lines = {}
    for stream, line in re.findall(r"^ +Stream #0:(\d+)\S*: Audio: (.*)", text, re.MULTILINE):
        lines[int(stream)] = line
    tracks = []
    for number, stream in enumerate(sorted(lines), start=1):
        tracks.append(Track(f"0:{stream}", number, "(default)" in lines[stream]))
    return sorted(tracks, key=lambda track: not track.is_default)


def ffmpeg_input(path: Path) -> list[str]:
    """Returns the arguments that let ffmpeg open this file, and no other that it refers to."""
    options = ["-protocol_whitelist", "file", "-format_whitelist", FFMPEG_FORMATS]
    return [*options, "-i", f"file:{path.absolute()}"]


@contextmanager
def errors_of_starting(path: Path) -> Iterator[None]:
    """Turns the errors of starting ffmpeg, to read this file, into ValueErrors."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(
            f"{path}: not a plain WAV file, and ffmpeg, which reads other formats, "
            "is not installed."
        ) from None
    except OSError as error:
        raise ValueError(f"{path}: ffmpeg cannot be run ({error.strerror}).") from None
