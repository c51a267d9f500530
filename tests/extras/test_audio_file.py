"""Audio files: all common WAV formats, other containers through ffmpeg, and resampling."""

import math
import struct
import subprocess
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from films import CODECS as FILMS
from films import begin_of_sound, run_ffmpeg, write_film
from memory import at_most
from places import SHARED, TINY
from plumbing.audio_file import (
    AUDIO_SUFFIXES,
    explain_ffmpeg,
    load_audio,
    resample,
    resample_piece,
)
from plumbing.timeline import find_gaps, gaps_between, on_timeline
from signals import sound, write_wav
from wav import wav_bytes

DIGITS = TINY / "samples" / "digits.wav"  # 2 s
RAIN = TINY / "samples" / "rain.wav"


def warnings_of(*arguments, **options) -> list[str]:
    """What `load_audio` warns about."""
    messages = []
    load_audio(*arguments, **options, warn=messages.append)
    return messages


# ---- WAV ----


@pytest.mark.parametrize("extensible", [False, True])
@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("code, bits", [(1, 8), (1, 16), (1, 24), (1, 32), (3, 32), (3, 64)])
def test_every_common_wav_is_read_without_ffmpeg_and_its_channels_are_averaged(
    tmp_path, monkeypatch, code, bits, channels, extensible
):
    monkeypatch.setenv("PATH", "")  # no ffmpeg
    samples = sound(4000)[:, None] * np.linspace(0.2, 1, channels)
    path = tmp_path / "a.wav"
    path.write_bytes(wav_bytes(samples, code=code, bits=bits, extensible=extensible))
    precision = 2.0 ** -(min(bits, 24) - 2)
    assert np.abs(load_audio(path) - samples.mean(1)).max() < precision


def test_a_truncated_wav_yields_the_samples_it_has_with_a_warning(tmp_path):
    whole = wav_bytes(sound(16000)[:, None])
    path = tmp_path / "cut.wav"
    path.write_bytes(whole[:-16001])
    with pytest.warns(UserWarning, match=r"cut\.wav: truncated: only 0\.5 s of 1\.0 s are present"):
        assert len(load_audio(path)) == 7999


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"RIFF",
        b"RIFF\x04\0\0\0WAVE",
        wav_bytes(np.zeros((9, 1)))[:50],
        wav_bytes(np.zeros((0, 1))),
        wav_bytes(np.zeros((9, 0))),
        wav_bytes(np.zeros((9, 1)), rate=0),
        wav_bytes(np.zeros((9, 1)), rate=1000000),
    ],
)
def test_a_wav_without_samples_or_with_an_invalid_header_is_refused(tmp_path, content):
    path = tmp_path / "false.wav"
    path.write_bytes(content)
    reasons = "no readable samples|no audio that|not a plain WAV|an empty file|a sampling rate"
    with pytest.raises(ValueError, match=rf"false\.wav: ({reasons})"):
        load_audio(path)


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.wav: no such file"):
        load_audio(tmp_path / "gone.wav")


def test_a_directory_is_refused(tmp_path):
    with pytest.raises(ValueError, match="directory"):
        load_audio(tmp_path)


def unknown_size(content):
    """Removes the size from a WAV file, as in one written to a pipe."""
    position = content.index(b"data") + 4
    return content[:position] + b"\xff\xff\xff\xff" + content[position + 4 :]


def test_a_wav_of_unknown_size_is_read_without_a_warning(tmp_path):
    path = tmp_path / "pipe.wav"
    path.write_bytes(unknown_size(wav_bytes(sound(16000)[:, None])))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_audio(path, max_seconds=600)) == 16000


@pytest.mark.parametrize("size", [0, 0x7FFFF000, 0x80000000, 0xFFFFFFFF])
def test_a_size_that_a_program_writes_into_a_pipe_is_no_truncation(tmp_path, size):
    whole = wav_bytes(sound(16000)[:, None])
    path = tmp_path / "pipe.wav"
    path.write_bytes(whole.replace(struct.pack("<I", 32000), struct.pack("<I", size)))
    assert len(load_audio(path)) == 16000
    assert warnings_of(path) == []


def test_a_long_wav_of_unknown_size_needs_no_ffmpeg(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    path = tmp_path / "pipe.wav"
    path.write_bytes(unknown_size(wav_bytes(sound(48000)[:, None])))
    assert warnings_of(path, max_seconds=2) == ["3.0 s of audio: only the first 2.0 s are heard"]


SECOND = wav_bytes(sound(16000)[:, None])
DATA = SECOND[SECOND.index(b"data") :]


@pytest.mark.parametrize(
    "content, reason",
    [
        (SECOND + SECOND, "another recording follows after 1.0 s; it is not read."),
        (SECOND + DATA, "another recording follows after 1.0 s; it is not read."),
        (
            SECOND.replace(struct.pack("<I", 32000), struct.pack("<I", 8000)) + bytes(32000),
            "more sound than the header announces follows after 0.2 s; it is not read.",
        ),
    ],
)
def test_sound_that_is_left_out_of_a_wav_is_reported(tmp_path, content, reason):
    path = tmp_path / "two.wav"
    path.write_bytes(content)
    assert warnings_of(path) == [f"{path}: {reason}"]


@pytest.mark.parametrize("rest", [b"LIST\x04\0\0\0INFO", b"id3 \x03\0\0\0abc\0", bytes(999)])
def test_chunks_after_the_samples_of_a_wav_are_no_reason_to_warn(tmp_path, rest):
    path = tmp_path / "a.wav"
    path.write_bytes(SECOND + rest)
    assert warnings_of(path) == []


def test_an_impossible_sampling_rate_is_refused(tmp_path):
    path = tmp_path / "slow.wav"
    path.write_bytes(wav_bytes(sound(4000)[:, None], rate=500))
    with pytest.raises(ValueError, match=r"slow\.wav: a sampling rate of 500 Hz"):
        load_audio(path)


# ---- Long recordings ----


def write_silence(path, seconds, rate=48000):
    """Writes a sparse WAV file of zeros, which takes no space on the disk."""
    header = wav_bytes(np.zeros((1, 1)), rate=rate)[:-2]
    size = seconds * rate * 2
    with open(path, "wb") as file:
        file.write(header[:-4] + struct.pack("<I", size))
        file.truncate(len(header) + size)
    return path


def test_no_more_than_the_maximum_length_is_read(tmp_path):
    path = write_silence(tmp_path / "hour.wav", seconds=3600)
    messages = []
    with at_most(50_000_000):
        waveform = load_audio(path, max_seconds=20, warn=messages.append)
    assert len(waveform) == 20 * 16000
    assert messages[0] == "3600.0 s of audio: only the first 20.0 s are heard"


def test_a_killed_ffmpeg_is_not_mistaken_for_the_end_of_the_recording(tmp_path, monkeypatch):
    whole = write_wav(tmp_path / "whole.wav", sound(8000))
    killed = tmp_path / "ffmpeg"
    killed.write_text(f"#!/bin/sh\ncat {whole}\nkill -9 $$\n")
    killed.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (tmp_path / "a.mp3").write_bytes(b"not read by this ffmpeg")
    with pytest.warns(UserWarning, match="read as far as possible .ffmpeg ended with status -9"):
        assert len(load_audio(tmp_path / "a.mp3")) == 8000


def test_a_long_mp3_is_read_in_part_and_the_warning_states_its_full_length(tmp_path, ffmpeg):
    source = write_wav(tmp_path / "in.wav", sound(30 * 16000))
    path = tmp_path / "long.mp3"
    subprocess.run([ffmpeg, "-v", "error", "-i", source, "-ar", "44100", path], check=True)
    whole = load_audio(path)
    with pytest.warns(UserWarning, match=r"^30\.\d s of audio: only the first 12\.0 s are heard$"):
        beginning = load_audio(path, max_seconds=12)
    assert len(beginning) == 12 * 16000
    assert np.abs(beginning - whole[: 12 * 16000]).max() < 1e-5


def test_audio_beyond_the_maximum_length_is_not_kept_in_memory(processor, tmp_path):
    processor = type(processor)(processor.tokenizer, max_audio_len=30)
    path = write_silence(tmp_path / "hour.wav", seconds=3600)
    with pytest.warns(UserWarning, match="only the first"):
        waveform = processor.to_waveform(path)
    assert waveform.untyped_storage().nbytes() == 30 * 16000 * 4


@pytest.mark.parametrize("rate", [8000, 44100, 48000])
def test_resampling_in_parts_gives_the_same_result_as_resampling_the_whole(rate):
    waveform = sound(25 * rate)
    in_parts = resample(waveform, rate, 16000)
    in_one_piece = resample_piece(waveform, rate, 16000)
    assert in_parts.shape == in_one_piece.shape
    assert np.abs(in_parts - in_one_piece).max() < 1e-5


# ---- Other containers ----

CODECS = {
    "mp3": [],
    "flac": [],
    "ogg": [],
    "m4a": [],
    "wav": ["-c:a", "adpcm_ms"],
}


@pytest.mark.parametrize("suffix", CODECS)
def test_other_containers_are_read_through_ffmpeg(tmp_path, ffmpeg, suffix):
    original = sound(48000)
    source = write_wav(tmp_path / "in.wav", original)
    path = tmp_path / f"an odd 'name', ü.{suffix}"
    subprocess.run([ffmpeg, "-v", "error", "-i", source, *CODECS[suffix], path], check=True)
    decoded = load_audio(path)
    assert abs(len(decoded) - 48000) < 3000
    assert largest_correlation(decoded, original) > 0.9


def largest_correlation(a, b):
    """Returns the largest correlation over all delays, because a codec may add a delay."""
    size = 1 << 17
    products = np.fft.irfft(np.fft.rfft(a, size) * np.fft.rfft(b, size).conj())
    return products.max() / (np.linalg.norm(a) * np.linalg.norm(b))


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is not here")
def test_a_real_recording_keeps_its_length(ffmpeg):
    assert load_audio(SHARED / "data" / "jfk.flac").shape == (176000,)


def test_without_ffmpeg_other_containers_are_refused_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    path = tmp_path / "a.mp3"
    path.write_bytes(b"ID3 something")
    with pytest.raises(ValueError, match=r"a\.mp3: .*ffmpeg.* is not installed"):
        load_audio(path)


def test_a_file_without_audio_is_refused(tmp_path, ffmpeg):
    path = tmp_path / "text.mp3"
    path.write_text("no sound at all " * 99)
    with pytest.raises(ValueError, match=r"text\.mp3: no audio that ffmpeg can read"):
        load_audio(path)


@pytest.mark.parametrize(
    "name, playlist",
    [
        ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\na.wav\n#EXT-X-ENDLIST\n"),
        ("list.mp3", "ffconcat version 1.0\nfile FOLDER/a.wav\n"),
    ],
)
def test_a_playlist_that_refers_to_another_file_is_never_followed(tmp_path, ffmpeg, name, playlist):
    write_wav(tmp_path / "a.wav", sound(16000))
    path = tmp_path / name
    path.write_text(playlist.replace("FOLDER", str(tmp_path)))
    with pytest.raises(ValueError, match="no audio that ffmpeg can read"):
        load_audio(path)


# Suffixes of the same format, which ffmpeg recognizes by what is inside.
SAME_FORMAT = {
    ".wav": [".wave", ".bwf"],
    ".aiff": [".aif", ".aifc"],
    ".au": [".snd"],
    ".mp2": [".mpa"],
    ".aac": [".adts"],
    ".ogg": [".oga", ".ogv"],
    ".m4a": [".m4b", ".m4r", ".mp4", ".m4v", ".mov", ".qt", ".f4v"],
    ".3gp": [".3g2", ".3ga"],
    ".mkv": [".mka"],
    ".webm": [".weba"],
    ".wma": [".wmv", ".asf"],
    ".mpg": [".mpeg", ".vob"],
    ".ts": [".mts"],
}
FORMATS = sorted(AUDIO_SUFFIXES - set(chain(*SAME_FORMAT.values())))

# ffmpeg's options for suffixes that do not say enough.
OPTIONS = {
    ".opus": ["-c:a", "libopus"],
    ".spx": ["-c:a", "libspeex", "-ar", "16000"],
    ".3gp": ["-c:a", "aac"],
    ".m2ts": ["-f", "mpegts", "-mpegts_m2ts_mode", "1"],
}
# Speech codecs that ffmpeg can only read: a second of frames.
AMR = {
    ".amr": b"#!AMR\n" + 50 * (b"\x3c" + bytes(range(100, 131))),
    ".awb": b"#!AMR-WB\n" + 50 * (b"\x04" + bytes(range(100, 117))),
}


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_of_a_folder_is_read_and_a_codecs_delay_is_no_gap(tmp_path, ffmpeg, suffix):
    path = tmp_path / f"a{suffix}"
    if suffix in AMR:
        path.write_bytes(AMR[suffix])
    else:
        run_ffmpeg([ffmpeg, "-v", "error", "-i", DIGITS, *OPTIONS.get(suffix, []), path])
    messages = []
    waveform = load_audio(path, warn=messages.append)
    assert 0.9 <= len(waveform) / 16000 < 2.2
    assert find_gaps(path, len(waveform) / 16000) == []
    assert messages == []


# ---- Films ----


@pytest.mark.parametrize("suffix", FILMS)
def test_sound_that_begins_late_is_a_gap_at_the_beginning_of_a_film(tmp_path, ffmpeg, suffix):
    film = write_film(tmp_path / f"late.{suffix}", [DIGITS], late=3)
    waveform = load_audio(film)
    ((position, missing),) = find_gaps(film, len(waveform) / 16000)
    begin = begin_of_sound(waveform)
    assert position == 0
    assert abs(begin + missing - 3 - begin_of_sound(load_audio(DIGITS))) < 0.05


@pytest.mark.parametrize(
    "suffix, gap", [("mkv", 2), ("mp4", 2), ("ogv", 2), ("mkv", 15), ("ts", 15), ("mpg", 15)]
)
def test_a_gap_in_the_sound_of_a_film_is_found(tmp_path, ffmpeg, suffix, gap):
    film = write_film(tmp_path / f"gap.{suffix}", [DIGITS], seconds=20, gap=gap)
    waveform = load_audio(film)
    ((position, missing),) = find_gaps(film, len(waveform) / 16000)
    assert abs(position - 1) < 0.2
    assert abs(missing - gap) < 0.1
    assert len(waveform) < 2.2 * 16000  # nothing is inserted


def test_a_film_that_begins_within_a_track_has_no_gap(tmp_path, ffmpeg):
    film = write_film(tmp_path / "film.mp4", [DIGITS])
    part = run_ffmpeg(
        [ffmpeg, "-v", "error", "-ss", "0.5", "-i", film, "-c", "copy", tmp_path / "part.mp4"]
    )
    assert find_gaps(part, 10) == []


@pytest.mark.parametrize("suffix", ["mka", "m4a"])
def test_sound_alone_that_begins_late_is_late(tmp_path, ffmpeg, suffix):
    command = [ffmpeg, "-v", "error", "-itsoffset", "3", "-i", DIGITS]
    path = run_ffmpeg([*command, tmp_path / f"a.{suffix}"])
    ((position, missing),) = find_gaps(path, 10)
    begin = begin_of_sound(load_audio(path))
    assert abs(begin + missing - 3 - begin_of_sound(load_audio(DIGITS))) < 0.05


def test_the_longest_length_counts_the_sound_and_not_its_gaps(tmp_path, ffmpeg):
    film = write_film(tmp_path / "gap.mkv", [DIGITS], seconds=8, gap=4)
    with pytest.warns(UserWarning, match=r"^8\.\d s of audio: only the first 1\.5 s are heard$"):
        assert len(load_audio(film, max_seconds=1.5)) == 24000
    assert find_gaps(film, 0.5) == []


@pytest.mark.parametrize(
    "frames, gaps",
    [
        ([(0, 1), (1, 1)], []),
        ([(0.09, 1), (1.09, 1)], []),  # the delay of a codec
        ([(1.5, 1), (2.5, 1)], [(0, 1.5)]),
        ([(0, 1), (1.05, 1), (1.95, 1)], []),  # times are rounded
        ([(0, 1), (5, 1), (6, 1), (9, 0.5)], [(1, 4), (3, 2)]),
        ([(-5, 1), (-4, 1)], []),
        ([(0, 1), (1, 1), (0, 1), (1, 1)], []),  # joined: the clock begins again
        ([(0, 1), (9999, 1), (10000, 1)], []),  # the film has only 20 s
    ],
)
def test_gaps_are_found_in_the_times_of_frames(frames, gaps):
    assert gaps_between(frames, beginning=0, duration=20) == gaps


@pytest.mark.parametrize(
    "word, in_film",
    [
        ((0.2, 0.5), (3.2, 3.5)),
        ((0.8, 1.0), (3.8, 4.0)),
        ((1.0, 1.2), (6.0, 6.2)),
        ((0.7, 1.1), (3.7, 4.0)),  # a word does not span a gap
        ((0.9, 1.3), (6.0, 6.3)),
    ],
)
def test_a_word_is_on_the_side_of_a_gap_where_more_of_it_is(word, in_film):
    assert on_timeline(*word, gaps=[(0, 3), (1, 2)]) == pytest.approx(in_film)


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
def test_the_default_audio_track_is_read_and_the_number_of_tracks_is_reported(
    tmp_path, ffmpeg, suffix
):
    second = ["-disposition:a:0", "0", "-disposition:a:1", "default"]
    film = write_film(tmp_path / f"two.{suffix}", [RAIN, DIGITS], options=second)
    only = write_film(tmp_path / f"one.{suffix}", [DIGITS])
    waveform = load_audio(film)
    assert np.allclose(waveform[4000:24000], load_audio(only)[4000:24000], atol=1e-3)
    assert warnings_of(film) == [f"{film}: 2 audio tracks; number 2, the default one, is read."]


def test_the_first_audio_track_is_read_where_none_is_the_default(tmp_path, ffmpeg):
    film = write_film(tmp_path / "two.ts", [DIGITS, RAIN])
    only = write_film(tmp_path / "one.ts", [DIGITS])
    assert np.array_equal(load_audio(film), load_audio(only))
    assert warnings_of(film) == [f"{film}: 2 audio tracks; number 1 is read."]


def test_an_empty_audio_track_is_passed_over(tmp_path, ffmpeg):
    nothing = tmp_path / "empty.wav"
    nothing.write_bytes(wav_bytes(np.zeros((0, 1))))
    film = write_film(tmp_path / "two.mkv", [nothing, DIGITS])
    assert begin_of_sound(load_audio(film)) < 0.3
    assert warnings_of(film) == [f"{film}: 2 audio tracks; number 2 is read."]


# ---- Silence ----

RNG = np.random.default_rng(0)
SILENCES = {
    "zeros": np.zeros(16000),
    "dither": RNG.integers(-1, 2, 16000) / 32768,
    "offset": np.full(16000, 0.25),
}


@pytest.mark.parametrize("name", SILENCES)
def test_silence_is_reported_once_for_a_file_and_for_an_array(processor, tmp_path, name):
    path = tmp_path / "silent.wav"
    path.write_bytes(wav_bytes(SILENCES[name][:, None]))
    with pytest.warns(UserWarning, match="silence") as warned:
        processor("Hm?", processor.to_waveform(path))
        processor("Hm?", SILENCES[name])
    names = [str(warning.message).partition(": silence")[0] for warning in warned]
    assert names == [str(path), "Sample 0"]


@pytest.mark.parametrize("suffix", ["mp3", "flac"])
def test_silence_is_recognized_in_compressed_files(tmp_path, ffmpeg, suffix):
    command = [ffmpeg, "-v", "error", "-f", "lavfi", "-i", "anullsrc", "-t", "1"]
    path = run_ffmpeg([*command, tmp_path / f"silent.{suffix}"])
    assert "silence" in warnings_of(path)[0]


@pytest.mark.parametrize("bits, decibels", [(16, -70), (24, -70), (24, -80)])
def test_a_very_quiet_recording_is_not_called_silent(tmp_path, bits, decibels):
    path = tmp_path / "quiet.wav"
    path.write_bytes(wav_bytes(10 ** (decibels / 20) * sound(16000)[:, None], bits=bits))
    assert warnings_of(path) == []


def in_channels(path, *channels):
    path.write_bytes(wav_bytes(np.stack(channels, axis=1)))
    return path


@pytest.mark.parametrize("suffix", ["wav", "opus"])
def test_channels_that_cancel_are_reported(tmp_path, ffmpeg, suffix):
    speech = load_audio(DIGITS)
    path = in_channels(tmp_path / "in.wav", speech, -speech)
    options = OPTIONS.get(f".{suffix}", [])
    run_ffmpeg([ffmpeg, "-v", "error", "-i", path, *options, tmp_path / f"a.{suffix}"])
    messages = warnings_of(tmp_path / f"a.{suffix}")
    assert len(messages) == 1
    assert "its channels cancel each other: their mean keeps 0% of their energy" in messages[0]


@pytest.mark.parametrize(
    "channels",
    [
        [sound(16000), RNG.uniform(-1, 1, 16000)],
        [sound(16000), -0.5 * sound(16000)],
        [sound(16000), *[np.zeros(16000)] * 7],  # one of eight microphones
    ],
)
def test_channels_that_do_not_cancel_are_not_reported(tmp_path, channels):
    assert warnings_of(in_channels(tmp_path / "a.wav", *channels)) == []


# ---- Joined files ----


def encode(folder, name, *options):
    source = write_wav(folder / "in.wav", sound(32000))
    path = run_ffmpeg(["ffmpeg", "-v", "error", "-y", "-i", source, *options, folder / name])
    return path.read_bytes()


def joined(folder, *contents, suffix):
    path = folder / f"joined.{suffix}"
    path.write_bytes(b"".join(contents))
    return path


@pytest.mark.parametrize("options", [["-ar", "44100"], ["-write_id3v1", "1"]])
def test_a_joined_mp3_is_read_whole_without_a_warning(tmp_path, ffmpeg, options):
    first = encode(tmp_path, "a.mp3", "-ar", "44100")
    second = encode(tmp_path, "b.mp3", *options)
    path = joined(tmp_path, first, second, first, suffix="mp3")
    assert 6 <= len(load_audio(path)) / 16000 < 6.3
    assert warnings_of(path) == []


@pytest.mark.parametrize("codec", ["libvorbis", "flac"])
def test_a_chained_ogg_is_read_whole_without_a_warning(tmp_path, ffmpeg, codec):
    first = encode(tmp_path, "a.ogg", "-c:a", codec)
    second = encode(tmp_path, "b.ogg", "-c:a", codec, "-metadata", "title=b")
    path = joined(tmp_path, first, second, first, suffix="ogg")
    assert 5.9 <= len(load_audio(path)) / 16000 < 6.3
    assert warnings_of(path) == []
    assert len(warnings_of(path, max_seconds=1)) == 1  # about the length


@pytest.mark.parametrize("suffix, options", [("mp3", []), ("ogg", ["-c:a", "libvorbis"])])
def test_a_joined_file_that_is_damaged_is_called_damaged(tmp_path, ffmpeg, suffix, options):
    first = encode(tmp_path, f"a.{suffix}", *options)
    damaged = bytearray(first)
    damaged[-3000:-2000] = bytes(1000)
    for parts in ([first, damaged], [damaged, first]):
        path = joined(tmp_path, *parts, suffix=suffix)
        assert "read as far as possible" in warnings_of(path)[0]


def test_a_joined_mp3_whose_first_part_is_cut_off_is_called_damaged(tmp_path, ffmpeg):
    first = encode(tmp_path, "a.mp3")
    path = joined(tmp_path, first[:5000], first, suffix="mp3")
    assert "read as far as possible" in warnings_of(path)[0]


def test_a_cover_does_not_damage_an_mp3(tmp_path, ffmpeg):
    cover = [
        "-f",
        "lavfi",
        "-i",
        "testsrc=size=400x400:duration=0.04",
        "-map",
        "0",
        "-map",
        "1",
        "-frames:v",
        "1",
    ]
    picture = encode(tmp_path, "a.mp3", *cover, "-c:v", "png", "-disposition:v", "attached_pic")
    path = joined(tmp_path, picture, picture, suffix="mp3")
    assert warnings_of(path) == []


# ---- Resampling ----


def tone(hz: float, rate: int) -> np.ndarray:
    """One second of a sine."""
    seconds = np.arange(rate) / rate
    return np.sin(2 * math.pi * hz * seconds).astype(np.float32)


def decibels(x: np.ndarray) -> float:
    return 10 * math.log10(np.square(x).mean())


def signal_to_noise(waveform: np.ndarray, expected: np.ndarray) -> float:
    """Returns decibels, computed without the abrupt beginning and end of the recording."""
    noise = waveform[: len(expected)] - expected
    return decibels(expected[500:-500]) - decibels(noise[500:-500])


@pytest.mark.parametrize("rate", [7919, 8000, 11025, 16000, 22050, 44100, 48000, 96000, 192000])
def test_n_samples_become_n_times_16000_over_rate_rounded_up(rate):
    for samples in (1, 7, 1000, rate + 1):
        resampled = resample(np.zeros(samples, np.float32), rate, 16000)
        assert len(resampled) == math.ceil(samples * 16000 / rate)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 96000])
def test_a_tone_is_resampled_without_delay_at_65_decibels_signal_to_noise(rate):
    assert signal_to_noise(resample(tone(1000, rate), rate, 16000), tone(1000, 16000)) >= 65


@pytest.mark.parametrize("rate", [44101, 191999, 767999])
def test_an_unusual_rate_is_resampled_accurately(rate):
    resampled = resample(tone(1000, rate), rate, 16000)
    assert len(resampled) == 16000
    assert signal_to_noise(resampled, tone(1000, 16000)) >= 30


@pytest.mark.parametrize("rate", [44100, 48000, 96000])
@pytest.mark.parametrize(
    "hz, lowest_gain, highest_gain",
    [
        (3000, -0.1, 0.1),
        (6500, -0.1, 0.1),
        (7000, -0.5, 0.5),
        (9500, -999, -60),
        (10500, -999, -80),
    ],
)
def test_the_filter_is_flat_below_8_khz_and_silent_above(rate, hz, lowest_gain, highest_gain):
    resampled = resample(tone(hz, rate), rate, 16000)
    gain = decibels(resampled[500:-500]) - decibels(tone(hz, rate))
    assert lowest_gain <= gain <= highest_gain


@pytest.mark.parametrize(
    "rate, samples",
    [(1000, 127), (4000, 127), (8000, 255), (24000, 511), (48000, 1023), (44100, 1000)],
)
def test_a_click_at_the_end_does_not_ring_at_the_beginning(rate, samples):
    click = np.zeros(samples, np.float32)
    click[-1] = 1
    resampled = resample(click, rate, 16000)
    assert np.abs(resampled[:20]).max() < 1e-3 * np.abs(resampled).max()


def test_later_samples_do_not_change_earlier_ones():
    waveform = sound(3 * 48000)
    whole = resample(waveform, 48000, 16000)
    beginning = resample(waveform[:60000], 48000, 16000)
    assert np.allclose(whole[:16000], beginning[:16000], atol=1e-6)


def test_the_number_of_threads_stays_the_callers_when_four_threads_read_at_once(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(wav_bytes(sound(441000)[:, None], rate=44100))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    with ThreadPoolExecutor(4) as readers:
        waveforms = list(readers.map(load_audio, [path] * 8))
    with ThreadPoolExecutor(1) as another:
        after = [torch.get_num_threads(), another.submit(torch.get_num_threads).result()]
    torch.set_num_threads(before)
    assert after == [3, 3]
    assert all(np.array_equal(waveform, waveforms[0]) for waveform in waveforms)


@pytest.mark.parametrize("name", ["https://a.b/c.wav", Path("https://a.b/c.wav")])
def test_a_url_is_refused(name):
    with pytest.raises(ValueError, match="a URL; only files are read, so download it first"):
        load_audio(name)


@pytest.mark.parametrize(
    "message, expected",
    [
        ("Stream map '0:a:0' matches no streams.", "it has video, but no audio"),
        ("[hls] Format not on whitelist 'mp3'", "a playlist or a rare kind of file; convert it"),
        ("[mp3 @ 0x55f] Failed to read", "[mp3] Failed to read"),
    ],
)
def test_messages_of_ffmpeg_are_made_understandable(message, expected):
    assert explain_ffmpeg(message).startswith(expected)
