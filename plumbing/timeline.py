"""The timeline of a film, whose sound may begin late or have gaps.

A decoder returns only the samples that are there. The model hears them without a gap, so times in
what it heard have to be translated to times in the film. Times are in seconds.
"""

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from plumbing.audio_file import is_wav
from plumbing.media_file import errors_of_starting, ffmpeg_input, probe

TOLERANCE = 0.1  # codecs delay the sound by less, and rounded times differ by less

Gap = tuple[float, float]  # the length of all sound before it, and of the gap itself


def find_gaps(path: str | Path, seconds: float) -> list[Gap]:
    """The gaps in the first `seconds` of sound of a file that `load_audio` has read.

    A film whose sound begins 3 s late has the gap (0, 3). Raises ValueError without ffmpeg.
    """
    path = Path(path)
    if not path.exists() or is_wav(path):  # it may have been removed meanwhile
        return []
    media = probe(path)
    if not media.has_times():
        return []
    for track in media.tracks:
        frames = list_frames(path, track.stream, seconds)
        if frames:  # a track without sound was passed over
            return gaps_between(frames, media.beginning(), media.duration)
    return []


def list_frames(path: Path, stream: str, seconds: float) -> list[tuple[float, float]]:
    """The time, as the file gives it, and the length of each frame, up to `seconds` of sound."""
    command = ["ffmpeg", "-nostdin", "-v", "quiet", "-copyts", *ffmpeg_input(path)]
    command += ["-map", stream, "-f", "framecrc", "-"]
    nothing = subprocess.DEVNULL
    with errors_of_starting(path):
        process = subprocess.Popen(
            command, stdin=nothing, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
    rate = 1
    frames = []
    with process:
        for line in process.stdout:
            unit = re.match(r"#tb 0: 1/(\d+)$", line)
            if unit:
                rate = int(unit[1])
            frame = re.match(r"0, *-?\d+, *(-?\d+), *(\d+),", line)
            if frame:
                frames.append((int(frame[1]) / rate, int(frame[2]) / rate))
                seconds -= frames[-1][1]
            if seconds <= 0:
                process.kill()
                break
    return frames


def gaps_between(frames: list[tuple[float, float]], beginning: float, duration: float) -> list[Gap]:
    """The gaps between frames, given by time and length.

    beginning: the time at which the film begins. duration: the film's; 0 if unknown.
    """
    heard = 0.0  # the length of the frames so far
    missing = 0.0
    gaps = []
    for time, length in frames:
        gap = time - beginning - heard - missing
        is_beyond_the_end = duration > 0 and time - beginning > duration + 1
        if heard == 0 and abs(gap) <= TOLERANCE:
            beginning += gap  # the delay of a codec
        elif gap < -TOLERANCE or is_beyond_the_end:
            beginning += gap  # another clock: several files were joined
        elif gap > TOLERANCE:
            gaps.append((heard, gap))
            missing += gap
        heard += length
    return gaps


def on_timeline(begin: float, end: float, gaps: Sequence[Gap]) -> tuple[float, float]:
    """The times in the film of a word from begin to end in its sound.

    A word does not span a gap; it is on the side where more of it is.
    """
    shift = 0.0
    earliest = begin
    latest = end
    for position, missing in gaps:
        if position <= (begin + end) / 2:
            shift += missing
            earliest = max(begin, position)
        else:
            latest = min(latest, position)
    return earliest + shift, latest + shift
