"""exact.py --layers reports the first difference. (Only loading the oracle needs transformers.)"""

import pytest
import torch

from exact import cut_to_real_frames, distance, first_difference, record


def stages(**changes):
    """Returns three stages of ones on both sides; `changes` are added to ours, by stage name."""
    names = ["layers.0.fc1", "layers.0", "layers.1"]
    return [(name, torch.ones(2, 3), torch.ones(2, 3) + changes.get(name, 0)) for name in names]


def test_equal_stages_have_no_first_difference():
    assert first_difference(stages(), tolerance=1e-4) is None


def test_the_first_of_several_differences_is_reported():
    changed = stages(**{"layers.0": 0.5, "layers.1": 0.9})
    assert first_difference(changed, tolerance=1e-4).startswith("layers.0: 5.0e-01")


def test_a_difference_within_the_tolerance_is_ignored():
    changed = stages(**{"layers.0.fc1": 1e-5})
    assert first_difference(changed, tolerance=1e-4) is None


def test_nan_counts_as_a_difference():
    changed = stages(**{"layers.1": torch.nan})
    assert first_difference(changed, tolerance=1e-4).startswith("layers.1")


def test_another_shape_counts_as_a_difference():
    pair = [("pool", torch.ones(2, 3), torch.ones(2, 4))]
    assert "shape (2, 4), transformers' (2, 3)" in first_difference(pair, tolerance=1e-4)


def test_the_difference_is_relative_to_the_largest_value():
    assert distance(torch.tensor([1.0, -50.0]), torch.tensor([1.5, -50.0])) == pytest.approx(0.01)


def test_stages_are_recorded_in_the_order_of_computation(model, processor):
    names = ["audio_tower.conv1", "audio_tower.layers.1", "language_model.model.layers.0"]
    modules = dict(model.named_modules())
    batch = processor("Hi", torch.zeros(16080))
    outputs = record({name: modules[name] for name in names}, model, batch)
    assert list(outputs) == [*names[:2], "splice", names[2], "logits"]


def test_padding_frames_are_excluded_from_the_comparison():
    whole = torch.zeros(1, 1500, 32)
    assert cut_to_real_frames("audio_tower.layers.3.fc1", whole, mel_frames=101).shape[1] == 51
