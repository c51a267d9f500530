"""Joined recordings: mp3 or ogg files that were written one after the other into one file.

ffmpeg reads them whole, but takes the headers at the joints for damaged sound, and complains. Its
complaints mean nothing if the file consists of undamaged pages, or of complete frames and tags.
"""

import mmap
import re
from pathlib import Path

# What ffmpeg writes about the joints.
AT_JOINTS = re.compile(
    "Header missing$|Error parsing the packet header|failed to create or replace stream"
    "|Error (while decoding stream|submitting packet).* Invalid data found"
)


def are_about_joints(complaints: list[str], path: Path) -> bool:
    """Whether ffmpeg complains only about the joints of a file that is not damaged."""
    if not complaints or not all(AT_JOINTS.search(line) for line in complaints):
        return False
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return is_chain(content) if content[:4] == b"OggS" else is_joined_mp3(content)


# ---- Ogg ----

PAGE_HEADER = 27  # bytes; then come the sizes of a page's segments, one byte each
BEGINS_STREAM = 2  # a flag of a page


def is_chain(content: bytes | mmap.mmap) -> bool:
    """Whether an ogg file consists of whole pages, with a stream that begins after another.

    ffmpeg compares the checksum of each page, and complains in other words if it differs.
    """
    num_joints = 0
    was_beginning = True
    position = 0
    while position < len(content):
        if content[position : position + 4] != b"OggS" or position + PAGE_HEADER > len(content):
            return False
        is_beginning = bool(content[position + 5] & BEGINS_STREAM)
        num_joints += int(is_beginning and not was_beginning)
        was_beginning = is_beginning
        segments = position + PAGE_HEADER
        position = segments + content[position + 26]
        position += sum(content[segments:position])
    return position == len(content) and num_joints > 0


# ---- mp3 ----

# Bit rates in kbit/s by a frame header's 4 bits, and sampling rates by its 2 bits.
BIT_RATES = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
BIT_RATES_2 = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)  # MPEG-2 and 2.5
SAMPLING_RATES = (44100, 48000, 32000)
RATE_DIVISORS = {3: 1, 2: 2, 0: 4}  # by the header's version: MPEG-1, MPEG-2 and MPEG-2.5
LAYER_3 = 1


def is_joined_mp3(content: bytes | mmap.mmap) -> bool:
    """Whether an mp3 file consists of whole frames and tags, with a tag between frames."""
    num_joints = 0
    num_frames = 0
    was_tag = True
    position = 0
    while position < len(content):
        head = content[position : position + 16]
        size = tag_size(head)
        is_tag = size > 0
        if not is_tag:
            size = frame_size(head)
            num_frames += 1
            num_joints += int(was_tag)
        was_tag = is_tag
        if size == 0:
            return False
        position += size
    return position == len(content) and num_joints > 1


def tag_size(head: bytes) -> int:
    """The size in bytes of the tag that begins so; 0 if none does."""
    if head[:3] == b"ID3" and len(head) >= 10:
        size = 10
        for shift, byte in zip((21, 14, 7, 0), head[6:10]):
            size += (byte & 0x7F) << shift
        return size
    if head[:3] == b"TAG":
        return 128
    if head[:8] == b"APETAGEX":  # its header; the size that it gives includes the footer
        return 32 + int.from_bytes(head[12:16], "little")
    return 0


def frame_size(head: bytes) -> int:
    """The size in bytes of the frame of MPEG layer 3 that begins so; 0 if none does."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return 0
    version = head[1] >> 3 & 3
    layer = head[1] >> 1 & 3
    bit_rate = head[2] >> 4
    sampling_rate = head[2] >> 2 & 3
    padding = head[2] >> 1 & 1
    if version == 1 or layer != LAYER_3 or bit_rate in (0, 15) or sampling_rate == 3:
        return 0
    hz = SAMPLING_RATES[sampling_rate] // RATE_DIVISORS[version]
    if version == 3:
        return 144000 * BIT_RATES[bit_rate - 1] // hz + padding
    return 72000 * BIT_RATES_2[bit_rate - 1] // hz + padding
