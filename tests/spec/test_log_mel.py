"""A window of samples becomes a log-mel spectrogram, as in Whisper: 128 bands, 3000 frames."""

import math

import numpy as np
import pytest
import torch

from processor import log_mel, mel_filters


def plain_power(samples, frame):
    """The power of 201 frequencies, 0 Hz, 40 Hz, ... 8 kHz, in the 400 samples of a mel frame."""
    mirrored = np.pad(samples.astype(np.float64), 200, mode="reflect")
    n = np.arange(400)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * n / 400)
    seen = mirrored[160 * frame : 160 * frame + 400] * hann
    return np.array(
        [abs(np.sum(seen * np.exp(-2j * np.pi * k * n / 400))) ** 2 for k in range(201)]
    )


def plain_edges():
    """Slaney's scale: 15 mel per kHz up to 1 kHz; above, 27 mel more are 6.4 times as many Hz."""
    mel_of_8_khz = 15 + 27 * math.log(8) / math.log(6.4)
    edges = []
    for number in range(130):
        mel = number * mel_of_8_khz / 129
        edges.append(mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27))
    return edges


def plain_frame(samples, frame):
    """One frame of the spectrogram, (128,)."""
    power = plain_power(samples, frame)
    return (np.log10(mel_filters().double().numpy() @ power) + 4) / 4


def test_a_window_has_128_bands_and_3000_frames_however_short_it_is(sound):
    for num_samples in (321, 80_000, 480_000):
        assert log_mel(torch.from_numpy(sound(num_samples))).shape == (128, 3000)


def test_a_frame_sees_400_samples_around_its_beginning():
    for place, frames in [(8_000, [49, 50, 51]), (8_050, [50, 51])]:  # frame 50 begins at 8,000
        click = torch.zeros(16_000)
        click[place] = 1

        spectrogram = log_mel(click)

        hears = (spectrogram > spectrogram.min()).any(dim=0)
        assert hears.nonzero()[:, 0].tolist() == frames


def test_a_frame_is_the_log_power_of_a_periodic_hann_window(sound):
    samples = sound(16_000)

    spectrogram = log_mel(torch.from_numpy(samples)).double().numpy()

    for frame in (7, 50, 98):
        assert np.abs(spectrogram[:, frame] - plain_frame(samples, frame)).max() < 1e-4


def test_the_samples_before_the_first_are_its_mirror_image(sound):
    samples = sound(16_000)

    spectrogram = log_mel(torch.from_numpy(samples)).double().numpy()

    assert np.abs(spectrogram[:, 0] - plain_frame(samples, 0)).max() < 1e-4


def test_the_samples_after_30_s_are_the_mirror_image_of_the_padded_window(sound):
    samples = sound(479_950)
    padded = np.pad(samples, (0, 50))

    spectrogram = log_mel(torch.from_numpy(samples)).double().numpy()

    assert np.abs(spectrogram[:, 2999] - plain_frame(padded, 2999)).max() < 1e-4


def test_a_short_clip_is_followed_by_silence_up_to_30_s(sound):
    for num_samples in (16_000, 16_050):
        samples = torch.from_numpy(sound(num_samples))
        padded = torch.cat([samples, torch.zeros(480_000 - num_samples)])

        assert (log_mel(samples) - log_mel(padded)).abs().max() < 1e-5


def test_silence_has_the_power_1e_10_and_so_the_value_minus_1_5():
    silence = log_mel(torch.zeros(16_000))

    assert (silence == -1.5).all()  # (log10(1e-10) + 4) / 4


def test_no_value_is_more_than_80_db_below_the_loudest_of_the_window(sound):
    loud = torch.from_numpy(sound(16_000))
    then_silence = torch.cat([loud, torch.zeros(16_000)])

    spectrogram = log_mel(then_silence)

    assert spectrogram.max() - spectrogram.min() == pytest.approx(2)  # 80 dB are 8, then 8 / 4
    assert (spectrogram[:, 150] == spectrogram.min()).all()


def test_each_window_has_its_own_loudest_value(processor, sound):
    quiet = 0.001 * sound(16_000)

    alone = processor("Hi", quiet)["input_features"][0]
    beside = processor(["Hi", "Hi"], [sound(16_000), quiet])["input_features"][1]

    assert torch.equal(alone, beside)


def test_twice_the_amplitude_adds_0_1505_to_every_value(sound):
    samples = torch.from_numpy(sound(480_000))

    difference = log_mel(2 * samples) - log_mel(samples)

    assert (difference - 0.1505).abs().max() < 1e-3  # log10(4) / 4


def test_the_filters_are_triangles_between_edges_evenly_spaced_in_mel():
    edges = plain_edges()
    for number, weights in enumerate(mel_filters().double()):
        left, center, right = edges[number : number + 3]
        for k, weight in enumerate(weights.tolist()):
            slope = min((40 * k - left) / (center - left), (right - 40 * k) / (right - center))
            assert weight == pytest.approx(max(0, slope) * 2 / (right - left), abs=1e-8)


def test_the_area_under_a_filter_is_1():
    areas = 40 * mel_filters().sum(1)  # weights are 40 Hz apart, so narrow filters are coarse

    assert (areas[100:] - 1).abs().max() < 0.02
    assert areas.mean() == pytest.approx(1, abs=0.01)


def test_a_tone_is_loudest_in_the_band_around_it():
    seconds = torch.arange(16_000, dtype=torch.float64) / 16_000
    for hz, band in [(1000, 42), (4000, 99), (6000, 116)]:
        tone = (2 * math.pi * hz * seconds).sin().float()

        assert log_mel(tone)[:, 50].argmax() == band
