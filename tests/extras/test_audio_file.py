"""Audio files: all common WAV formats, other containers through ffmpeg, and resampling."""

import math
import struct
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from peak_memory import peak_bytes
from places import SHARED
from plumbing.audio_file import explain_ffmpeg, load_audio, resample, resample_piece
from signals import sound, write_wav
from wav import wav_bytes

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
    memory = peak_bytes()
    with pytest.warns(UserWarning, match=r"^3600\.0 s of audio: only the first 20\.0 s are heard$"):
        waveform = load_audio(path, max_seconds=20)
    assert len(waveform) == 20 * 16000
    assert peak_bytes() - memory < 50e6


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
    waveform = torch.from_numpy(sound(25 * rate))
    in_parts = resample(waveform, rate, 16000)
    in_one_piece = resample_piece(waveform, rate, 16000)
    assert in_parts.shape == in_one_piece.shape
    assert (in_parts - in_one_piece).abs().max() < 1e-5


# ---- Other containers ----

CODECS = {
    "mp3": [],
    "flac": [],
    "ogg": [],
    "m4a": [],
    "opus": ["-c:a", "libopus"],
    "mkv": [],
    "mp4": [],
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


# ---- Resampling ----


def tone(hz: float, rate: int) -> torch.Tensor:
    """One second of a sine."""
    seconds = torch.arange(rate, dtype=torch.float64) / rate
    return torch.sin(2 * math.pi * hz * seconds).float()


def decibels(x: torch.Tensor) -> float:
    return float(10 * x.square().mean().log10())


def signal_to_noise(waveform: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns decibels, computed without the abrupt beginning and end of the recording."""
    noise = waveform[: len(expected)] - expected
    return decibels(expected[500:-500]) - decibels(noise[500:-500])


@pytest.mark.parametrize("rate", [7919, 8000, 11025, 16000, 22050, 44100, 48000, 96000, 192000])
def test_n_samples_become_n_times_16000_over_rate_rounded_up(rate):
    for samples in (1, 7, 1000, rate + 1):
        resampled = resample(torch.zeros(samples), rate, 16000)
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
    click = torch.zeros(samples)
    click[-1] = 1
    resampled = resample(click, rate, 16000)
    assert resampled[:20].abs().max() < 1e-3 * resampled.abs().max()


def test_later_samples_do_not_change_earlier_ones():
    waveform = torch.from_numpy(sound(3 * 48000))
    whole = resample(waveform, 48000, 16000)
    beginning = resample(waveform[:60000], 48000, 16000)
    assert torch.allclose(whole[:16000], beginning[:16000], atol=1e-6)


def test_reading_restores_the_number_of_threads(tmp_path, monkeypatch):
    path = write_wav(tmp_path / "a.wav", sound(4000))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    seen = []

    def to_mono(content, header):
        seen.append(torch.get_num_threads())
        return torch.zeros(9)

    monkeypatch.setattr("plumbing.audio_file.to_mono", to_mono)
    load_audio(path)
    after = torch.get_num_threads()
    torch.set_num_threads(threads)
    assert (seen, after) == ([1], 2)


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
