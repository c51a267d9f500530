"""Makes films with ffmpeg: a black picture, and sound that may begin late or have a gap."""

import subprocess
from pathlib import Path

import numpy as np
import pytest

# For each suffix, the codecs of picture and sound.
CODECS = {
    "mkv": ("mpeg4", "aac"),
    "mp4": ("mpeg4", "aac"),
    "mov": ("mpeg4", "aac"),
    "ts": ("mpeg4", "aac"),
    "mpg": ("mpeg2video", "mp2"),
    "flv": ("flv1", "aac"),
    "webm": ("libvpx", "libopus"),
    "ogv": ("libtheora", "libvorbis"),
    "wmv": ("msmpeg4", "wmav2"),
}


def write_film(
    path: Path, recordings: list, seconds: int = 8, late: float = 0, gap: float = 0, options=()
) -> Path:
    """Writes a film with an audio track for each recording; skips the test if ffmpeg cannot.

    late: the sound begins so many seconds after the picture. gap: it pauses for so many seconds,
    from 1 s on. options: ffmpeg's for the film.
    """
    picture, sound = CODECS[path.suffix[1:]]
    command = ["ffmpeg", "-v", "error", "-f", "lavfi"]
    command += ["-i", f"color=black:size=16x16:rate=25:duration={seconds}"]
    for recording in recordings:
        command += ["-itsoffset", late, "-i", recording]
    for number in range(len(recordings) + 1):
        command += ["-map", number]
    command += ["-c:v", picture, "-c:a", sound]
    if gap:
        command += ["-af", f"asetpts=PTS+gte(T\\,1)*{gap}/TB"]
    return run_ffmpeg([*command, *options, path])


def run_ffmpeg(command: list) -> Path:
    """Runs ffmpeg; returns the last word, which is the file that it writes."""
    command = [str(word) for word in command]
    if subprocess.run(command, stdin=subprocess.DEVNULL).returncode != 0:
        pytest.skip("this ffmpeg cannot write such a file")
    return Path(command[-1])


def begin_of_sound(waveform: np.ndarray) -> float:
    """The time in seconds of the first sample, at 16 kHz, that is not quiet."""
    return float(np.flatnonzero(np.abs(waveform) > 0.02)[0]) / 16000
