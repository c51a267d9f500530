"""Whatever lies on a disk: each file is read, or refused in one line that names it; nothing hangs, nothing is executed."""

import math
import os
import random
import resource
import struct
import subprocess
import time

import numpy as np
import pytest
import torch

from processor import SAMPLE_RATE, load_audio, log_mel
from signals import sound

PCM = (0.5 * sound(4000) * 32767).astype("<i2").tobytes()
KINDS = {
    "u8": (1, 8),
    "i16": (1, 16),
    "i24": (1, 24),
    "f32": (3, 32),
    "f64": (3, 64),
    "mulaw": (7, 8),
    "adpcm": (2, 4),
}
U16, U32 = (
    [0, 1, 2, 3, 255, 256, 32767, 65535],
    [0, 1, 2, 3, 17, 1000, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1],
)
EXTREMES = {
    "riff_size": U32,
    "fmt_size": [*U32, 14, 15, 16, 18, 40],
    "code": [*U16, 6, 7, 17, 0x55, 0xFFFE],
    "channels": U16,
    "rate": [*U32, 7, 999, 44101, 767999, 768000, 768001],
    "byte_rate": U32,
    "block": [*U16, 4, 6, 8],
    "bits": [*U16, 7, 8, 12, 16, 24, 32, 33, 64],
    "data_size": [*U32, len(PCM) - 1, len(PCM) + 1],
}


def wav(
    kind: str = "i16",
    magic: bytes = b"RIFF",
    form: bytes = b"WAVE",
    before: bytes = b"",
    pcm: bytes = PCM,
    **fields,
) -> bytes:
    """A WAV file of any kind, with any header field set to any value."""
    code, bits = KINDS[kind]
    h = {
        "riff_size": 36 + len(before) + len(pcm),
        "fmt_size": 16,
        "code": code,
        "channels": 1,
        "rate": 16000,
        "byte_rate": 2000 * bits,
        "block": bits // 8,
        "bits": bits,
        "data_size": len(pcm),
    } | fields
    return (
        struct.pack(
            "<4sI4s4sIHHIIHH",
            magic,
            h["riff_size"],
            form,
            b"fmt ",
            h["fmt_size"],
            h["code"],
            h["channels"],
            h["rate"],
            h["byte_rate"],
            h["block"],
            h["bits"],
        )
        + before
        + struct.pack("<4sI", b"data", h["data_size"])
        + pcm
    )


def odd_wavs() -> dict[str, bytes]:
    whole = wav()
    found = {
        f"{kind} {field}={value}": wav(kind, **{field: value})
        for kind in ("i16", "f32", "mulaw")
        for field, values in EXTREMES.items()
        for value in values
    }
    found |= {f"cut at {at}": whole[:at] for at in [*range(0, 47), len(whole) // 2, len(whole) - 1]}
    found |= {f"{kind} cut": wav(kind)[:3000] for kind in KINDS} | {
        f"{kind} whole": wav(kind) for kind in KINDS
    }
    found |= {
        f"magic {magic!r}": wav(magic=magic)
        for magic in (b"RIFX", b"RF64", b"riff", b"FORM", b"\0\0\0\0", b"OggS", b"fLaC", b"ID3\4")
    }
    found |= {
        "not WAVE": wav(form=b"AVI "),
        "four gigabytes in 44 bytes": wav(pcm=b"", data_size=2**32 - 4, riff_size=2**32 - 1),
        "no samples": wav(pcm=b""),
        "one byte": wav(pcm=b"\1"),
        "data before fmt": whole[:12] + whole[36:] + whole[12:36],
        "two fmt": wav(before=whole[12:36]),
        "two data": whole + whole[36:],
        "trailing rubbish": whole + b"\xff" * 999,
        "odd chunk": wav(before=b"junk\x03\0\0\0abc\0"),
        "odd chunk without padding": wav(before=b"junk\x03\0\0\0abc"),
        "chunk of 4 GB": wav(before=b"junk\xff\xff\xff\xff"),
        "text": b"Hello, world!\n" * 99,
        "html": b"<html>" * 99,
        "zeros": bytes(9999),
        "noise": random.Random(0).randbytes(9999),
        "python": b"import os; os.abort()\n" * 99,
        "playlist": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
        "remote playlist": b"#EXTM3U\nhttp://127.0.0.1:9/a.mp3\n",
        "concat": b"ffconcat version 1.0\nfile /etc/passwd\n",
        "sdp": b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=audio 9 RTP/AVP 0\n",
    }
    return found


def outcome(path) -> str:
    """'' if the file was read; else the refusal, which is one line and names the file."""
    start = time.perf_counter()
    try:
        waveform = load_audio(path)
        assert waveform.ndim == 1 and waveform.dtype == np.float32 and len(waveform)
        said = ""
    except (ValueError, OSError) as error:
        said = str(error)
        assert path.name in said and "\n" not in said.replace(path.name, "")
    assert time.perf_counter() - start < 10
    return said


@pytest.mark.filterwarnings("ignore")
def test_three_hundred_odd_wav_files_are_read_or_refused_by_name_within_bounded_memory(tmp_path):
    files, before = odd_wavs(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(files) >= 300
    outcomes = {}
    for name, content in files.items():
        (path := tmp_path / "odd.wav").write_bytes(content)
        outcomes[name] = outcome(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB
    read = {name for name, said in outcomes.items() if not said}
    assert {
        "i16 whole",
        "f32 whole",
        "two fmt",
        "two data",
        "trailing rubbish",
        "odd chunk",
        "i16 data_size=4294967295",
    } <= read
    assert not read & {
        "not WAVE",
        "no samples",
        "text",
        "html",
        "zeros",
        "playlist",
        "remote playlist",
        "concat",
        "sdp",
        "four gigabytes in 44 bytes",
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "container, codec",
    [
        ("mp3", "libmp3lame"),
        ("flac", "flac"),
        ("ogg", "libvorbis"),
        ("opus", "libopus"),
        ("m4a", "aac"),
        ("aiff", "pcm_s16be"),
        ("w64", "pcm_s16le"),
    ],
)
def test_containers_cut_at_random_points_are_read_or_refused_by_name(
    tmp_path, ffmpeg, container, codec
):
    (tmp_path / "a.wav").write_bytes(wav(pcm=PCM * 8))
    whole = tmp_path / f"whole.{container}"
    if subprocess.run(
        [ffmpeg, "-v", "error", "-i", tmp_path / "a.wav", "-c:a", codec, whole]
    ).returncode:
        pytest.skip(f"this ffmpeg has no {codec}")
    assert outcome(whole) == ""
    content, rng = whole.read_bytes(), random.Random(1)
    for at in rng.sample(range(len(content)), 8):
        (path := tmp_path / f"cut.{container}").write_bytes(content[:at])
        outcome(path)
        spoilt = bytearray(content)
        spoilt[at] ^= 0xFF
        path.write_bytes(spoilt)
        outcome(path)


@pytest.mark.parametrize(
    "name",
    [
        "with space.wav",
        "new\nline.wav",
        "quote'\".wav",
        "-y.wav",
        "%d.wav",
        "日本語.wav",
        "a:b|c.wav",
        b"\xff\xfe.wav",
        "file:x.wav",
    ],
)
@pytest.mark.parametrize("kind", ["i16", "mulaw"])
def test_any_file_name_is_a_file_name(tmp_path, ffmpeg, monkeypatch, kind, name):
    monkeypatch.chdir(tmp_path)
    path = os.fsdecode(name)
    with open(path, "wb") as file:
        file.write(wav(kind))
    assert len(load_audio(path)) > 3000


def test_a_directory_a_pipe_a_device_and_a_link_to_itself_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "self.wav").symlink_to(tmp_path / "self.wav")
    (tmp_path / "null.wav").symlink_to("/dev/zero")
    for path in (tmp_path, tmp_path / "pipe.wav", tmp_path / "self.wav", tmp_path / "null.wav"):
        assert outcome(path)


# ---- Odd signals ----

SECOND = np.arange(SAMPLE_RATE)
SIGNALS = {
    "silence": 0 * SECOND,
    "square": np.where(SECOND % 100 < 50, 1, -1),
    "DC": 1 + 0 * SECOND,
    "impulse": SECOND == 800,
    "denormals": 1e-42 + 0 * SECOND,
    "loud": 1e9 * np.sin(SECOND),
    "shortest": SECOND[:321],
}


@pytest.mark.parametrize("name", SIGNALS)
def test_an_odd_signal_gives_a_finite_log_mel(processor, name):
    features = processor("Hm?", SIGNALS[name].astype(np.float32))["input_features"]
    assert features.isfinite().all() and features.abs().max() < 10


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_one_sample_that_is_no_sound_is_refused_in_words(processor, value):
    waveform = np.zeros(SAMPLE_RATE, dtype=np.float32)
    waveform[5000] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        processor("Hm?", waveform)


def test_eight_channels_at_96_kilohertz_are_read(tmp_path):
    channels = np.repeat((0.5 * sound(96000) * 32767).astype("<i2")[:, None], 8, axis=1)
    (tmp_path / "a.wav").write_bytes(wav(pcm=channels.tobytes(), channels=8, rate=96000, block=16))
    assert len(load_audio(tmp_path / "a.wav")) == SAMPLE_RATE


def test_ten_minutes_and_one_sample_are_ten_minutes_and_a_warning(processor):
    with pytest.warns(UserWarning, match=r"600\.0 s of audio: only the first 600\.0 s"):
        assert (
            len(
                processor("Hm?", np.zeros(600 * SAMPLE_RATE + 1, dtype=np.float32))[
                    "input_features"
                ]
            )
            == 20
        )


# ---- Properties, at random but always the same ----

RNG = random.Random(5)
BATCHES = [
    [
        RNG.choice([321, 16080, 479999, 480000, 480001, RNG.randrange(321, 1_000_000)])
        for _ in range(RNG.randint(1, 3))
    ]
    for _ in range(12)
]


@pytest.mark.parametrize("lengths", BATCHES, ids=str)
def test_there_are_as_many_sound_ids_as_frames_in_any_batch(model, processor, lengths):
    side = RNG.choice(["left", "right"])
    batch = processor(["Hm?"] * len(lengths), [sound(n) for n in lengths], padding_side=side)
    frames = model.get_audio_features(batch["input_features"], batch["feature_attention_mask"])
    assert int((batch["input_ids"] == processor.audio_token_id).sum()) == len(frames)


def test_order_and_company_change_no_row(model, processor):
    lengths = [321, 40000, 16080, 80000, 500000]
    alone = [
        model.generate(**processor("What?", sound(n)), max_new_tokens=6)[0, -6:] for n in lengths
    ]
    for _ in range(4):
        order = RNG.sample(range(5), RNG.randint(2, 5))
        batch = processor(
            ["What?"] * len(order),
            [sound(lengths[i]) for i in order],
            padding_side=RNG.choice(["left", "right"]),
        )
        assert torch.equal(
            model.generate(**batch, max_new_tokens=6)[:, -6:],
            torch.stack([alone[i] for i in order]),
        )


def test_five_thousand_random_strings_come_back_from_the_tokenizer_as_their_nfc(processor):
    import unicodedata

    alphabet = [
        "abc XYZ 019 \n\t.,;'\"",
        "äöüßéñ",
        "漢字かな",
        "🙂👍🏽",
        "e\u0301a\u0308",
        "\u202e\u200b\0",
        "<|im_end|>",
        "<sound>",
    ]
    for _ in range(5000):
        text = "".join(
            RNG.choice(RNG.choice(alphabet)) if RNG.random() < 0.9 else RNG.choice(alphabet)
            for _ in range(RNG.randint(0, 40))
        )
        assert processor.tokenizer.decode(
            processor.tokenizer.encode(text)
        ) == unicodedata.normalize("NFC", text)


def test_the_log_mel_of_two_windows_is_each_windows_own(processor):
    waveform = sound(900_001)
    features = processor("Hm?", waveform)["input_features"]
    for window, samples in zip(features, torch.from_numpy(waveform).split(480_000)):
        mel = log_mel(samples)
        assert torch.equal(window[:, : mel.shape[1]], mel)
