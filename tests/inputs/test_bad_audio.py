"""Damaged and odd audio files: each is either read or refused in one line that contains its name.
Nothing hangs, and no file makes the program open another."""

import os
import random
import struct
import subprocess

import numpy as np
import pytest
import torch

from memory import at_most
from plumbing.audio_file import load_audio
from processor import HOP_LENGTH, N_SAMPLES, SAMPLE_RATE, log_mel
from signals import sound, write_wav

# ---- Damaged files ----

SAMPLES = (0.5 * sound(4000) * 32767).astype("<i2").tobytes()

# The header's format code and bits per sample.
KINDS = {
    "u8": (1, 8),
    "i16": (1, 16),
    "i24": (1, 24),
    "f32": (3, 32),
    "f64": (3, 64),
    "mulaw": (7, 8),
    "adpcm": (2, 4),
}

# For each field of the header, values on both sides of what is possible, and the largest.
EXTREMES = {
    "riff_size": [0, 2**32 - 1],
    "fmt_size": [15, 18, 2**32 - 1],
    "code": [0x55, 0xFFFE],
    "channels": [0, 2, 65535],
    "rate": [0, 999, 1000, 768000, 768001, 2**32 - 1],
    "byte_rate": [0],
    "frame_bytes": [0, 65535],
    "bits": [7, 64],
    "data_size": [0, 1, len(SAMPLES) + 1, 2**31, 2**32 - 2, 2**32 - 1],
}


def odd_wav(
    kind: str = "i16",
    magic: bytes = b"RIFF",
    form: bytes = b"WAVE",
    before_data: bytes = b"",
    samples: bytes = SAMPLES,
    **fields,
) -> bytes:
    """Returns a WAV file; `fields` override any values of its header."""
    code, bits = KINDS[kind]
    header = {
        "riff_size": 36 + len(before_data) + len(samples),
        "fmt_size": 16,
        "code": code,
        "channels": 1,
        "rate": 16000,
        "byte_rate": 2000 * bits,
        "frame_bytes": bits // 8,
        "bits": bits,
        "data_size": len(samples),
    }
    header |= fields
    content = magic + struct.pack("<I", header["riff_size"]) + form
    content += b"fmt " + struct.pack("<I", header["fmt_size"])
    content += struct.pack("<HHI", header["code"], header["channels"], header["rate"])
    content += struct.pack("<IHH", header["byte_rate"], header["frame_bytes"], header["bits"])
    content += before_data + b"data" + struct.pack("<I", header["data_size"])
    return content + samples


def wavs_with_odd_headers() -> dict[str, bytes]:
    files = {}
    for field, values in EXTREMES.items():
        for value in values:
            files[f"{field}={value}"] = odd_wav(**{field: value})
    for magic in (b"RIFX", b"OggS"):
        files[f"magic {magic!r}"] = odd_wav(magic=magic)
    files["not WAVE"] = odd_wav(form=b"AVI ")
    sizes = {"data_size": 2**32 - 4, "riff_size": 2**32 - 1}
    files["four gigabytes in 44 bytes"] = odd_wav(samples=b"", **sizes)
    return files


def truncated_wavs() -> dict[str, bytes]:
    files = {}
    whole = odd_wav()
    for length in [0, 4, 18, 43, 44, 45, len(whole) // 2, len(whole) - 1]:
        files[f"cut at {length}"] = whole[:length]
    for kind in KINDS:
        files[f"{kind} whole"] = odd_wav(kind)
        if kind not in ("mulaw", "adpcm"):  # those that ffmpeg reads are cut off below
            files[f"{kind} cut"] = odd_wav(kind)[:3000]
    files["no samples"] = odd_wav(samples=b"")
    files["one byte"] = odd_wav(samples=b"\1")
    return files


def wavs_with_odd_chunks() -> dict[str, bytes]:
    whole = odd_wav()
    riff, fmt, data = whole[:12], whole[12:36], whole[36:]
    return {
        "data before fmt": riff + data + fmt,
        "two fmt": odd_wav(before_data=fmt),
        "two data": whole + data,
        "trailing rubbish": whole + b"\xff" * 999,
        "odd chunk": odd_wav(before_data=b"junk\x03\0\0\0abc\0"),
        "odd chunk without padding": odd_wav(before_data=b"junk\x03\0\0\0abc"),
        "chunk of 4 GB": odd_wav(before_data=b"junk\xff\xff\xff\xff"),
    }


OTHER_FILES = {
    "text": b"Hello, world!\n" * 99,
    "zeros": bytes(9999),
    "noise": random.Random(0).randbytes(9999),
    "playlist": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
    "remote playlist": b"#EXTM3U\nhttp://127.0.0.1:9/a.mp3\n",
    "concat": b"ffconcat version 1.0\nfile /etc/passwd\n",
    "sdp": b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=audio 9 RTP/AVP 0\n",
}

READABLE = {"i16 whole", "f32 whole", "two fmt", "two data", "trailing rubbish", "odd chunk"}
READABLE |= {"data_size=0", "data_size=4294967295", "rate=1000", "rate=768000", "byte_rate=0"}
UNREADABLE = set(OTHER_FILES) - {"noise"}
UNREADABLE |= {"not WAVE", "no samples", "four gigabytes in 44 bytes"}
UNREADABLE |= {"rate=0", "rate=999", "rate=768001", "channels=0", "cut at 18", "cut at 44"}


def refusal(path) -> str:
    """Returns '' if the file can be read, otherwise the one-line error with the file's name."""
    try:
        waveform = load_audio(path)
    except (ValueError, OSError) as error:
        message = str(error)
        assert path.name in message
        assert "\n" not in message.replace(path.name, "")
        return message
    assert waveform.ndim == 1
    assert waveform.dtype == np.float32
    assert len(waveform) > 0
    return ""


@pytest.mark.filterwarnings("ignore")
def test_damaged_wav_files_are_read_or_refused_with_little_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # without ffmpeg; it has its own test below
    files = wavs_with_odd_headers() | truncated_wavs() | wavs_with_odd_chunks() | OTHER_FILES
    path = tmp_path / "odd.wav"
    read = set()
    with at_most(300_000_000):
        for name, content in files.items():
            path.write_bytes(content)
            if not refusal(path):
                read.add(name)
    assert READABLE <= read
    assert not UNREADABLE & read


CODECS = {"mp3": "libmp3lame", "flac": "flac", "ogg": "libvorbis", "m4a": "aac"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", CODECS)
def test_a_container_truncated_or_damaged_anywhere_is_read_or_refused(tmp_path, ffmpeg, suffix):
    source = write_wav(tmp_path / "a.wav", sound(32000))
    whole = tmp_path / f"whole.{suffix}"
    command = [ffmpeg, "-v", "error", "-i", source, "-c:a", CODECS[suffix], whole]
    if subprocess.run(command).returncode != 0:
        pytest.skip(f"this ffmpeg has no {CODECS[suffix]}")
    assert refusal(whole) == ""
    content = whole.read_bytes()
    path = tmp_path / f"damaged.{suffix}"
    for position in (4, len(content) // 2):
        path.write_bytes(content[:position])
        refusal(path)
        damaged = bytearray(content)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        refusal(path)


# ---- Odd names ----


NAMES = [
    *("with space.wav", "new\nline.wav", "quote'\".wav", "-y.wav", "%d.wav", "日本語.wav"),
    *("a:b|c.wav", os.fsdecode(b"\xff\xfe.wav"), "file:x.wav"),
]


@pytest.mark.parametrize("name", NAMES)
def test_no_file_name_has_a_special_meaning(tmp_path, ffmpeg, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with open(name, "wb") as file:
        file.write(odd_wav("mulaw"))  # which ffmpeg reads
    assert len(load_audio(name)) > 3000


def test_the_reason_of_ffmpeg_does_not_repeat_a_name_that_is_not_utf_8(odd_clip, ffmpeg):
    with open(odd_clip, "wb") as file:
        file.write(b"no sound")
    with pytest.raises(ValueError) as caught:
        load_audio(odd_clip)
    assert str(caught.value).startswith(f"{odd_clip}: no audio that ffmpeg can read (")
    assert "file:" not in str(caught.value)


def test_a_directory_a_pipe_a_device_and_a_link_to_itself_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "self.wav").symlink_to(tmp_path / "self.wav")
    (tmp_path / "device.wav").symlink_to("/dev/zero")
    assert refusal(tmp_path)
    assert refusal(tmp_path / "pipe.wav")
    assert refusal(tmp_path / "self.wav")
    assert refusal(tmp_path / "device.wav")


# ---- Odd signals ----

SECOND = np.arange(SAMPLE_RATE)
SIGNALS = {
    "silence": 0 * SECOND,
    "square wave": np.where(SECOND % 100 < 50, 1, -1),
    "constant": 1 + 0 * SECOND,
    "impulse": SECOND == 800,
    "denormal numbers": 1e-42 + 0 * SECOND,
    "very loud": 1e9 * np.sin(SECOND),
    "shortest": SECOND[:321],
}


@pytest.mark.parametrize("name", SIGNALS)
def test_an_odd_signal_gives_a_finite_log_mel(processor, name):
    features = processor("Hm?", SIGNALS[name].astype(np.float32))["input_features"]
    assert features.isfinite().all()
    assert features.abs().max() < 10


def test_eight_channels_at_96_khz_are_read(tmp_path):
    mono = (0.5 * sound(96000) * 32767).astype("<i2")
    samples = np.repeat(mono[:, None], 8, axis=1).tobytes()
    path = tmp_path / "a.wav"
    path.write_bytes(odd_wav(samples=samples, channels=8, rate=96000, frame_bytes=16))
    assert len(load_audio(path)) == SAMPLE_RATE


@pytest.mark.parametrize("samples", [321, 479500, 479799, 479800, 479999])
def test_a_clip_of_any_length_has_the_log_mel_of_the_clip_padded_to_30_s(samples):
    clip = torch.from_numpy(sound(samples))
    padded = torch.cat([clip, torch.zeros(N_SAMPLES - samples)])
    assert (log_mel(clip) - log_mel(padded)).abs().max() < 1e-5


def test_the_spectrum_of_a_short_clip_is_not_computed_for_30_s(monkeypatch):
    lengths = []
    stft = torch.stft

    def noting_stft(samples, *arguments, **options):
        lengths.append(len(samples))
        return stft(samples, *arguments, **options)

    monkeypatch.setattr(torch, "stft", noting_stft)
    log_mel(torch.zeros(16000))
    log_mel(torch.zeros(N_SAMPLES))
    assert lengths == [103 * HOP_LENGTH, N_SAMPLES]


def test_the_log_mel_of_two_windows_is_the_log_mel_of_each_window(processor):
    waveform = torch.from_numpy(sound(900_001))
    features = processor("Hm?", waveform)["input_features"]
    first, second = waveform.split(N_SAMPLES)
    assert torch.equal(features, torch.stack([log_mel(first), log_mel(second)]))


def test_a_file_that_is_too_short_is_reported_with_its_name(processor, tmp_path):
    path = write_wav(tmp_path / "blip.wav", sound(320))
    with pytest.raises(ValueError, match=r"blip\.wav: .*320 samples; at least 321"):
        processor("Hi", path)
