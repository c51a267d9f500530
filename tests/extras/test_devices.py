"""Devices: one device, in whatever way it is named; others are refused."""

import pytest
import torch

from af3 import AudioFlamingo3ForConditionalGeneration
from plumbing import devices
from plumbing.devices import choose_device

from_pretrained = AudioFlamingo3ForConditionalGeneration.from_pretrained


@pytest.mark.parametrize("device", ["cpu", None, torch.device("cpu"), {"": "cpu"}, {"": None}])
def test_a_device_map_of_one_device_means_this_device(micro, device):
    assert from_pretrained(micro, device_map=device).device == torch.device("cpu")


@pytest.mark.parametrize("device_map", [1, "cuda:1", {"": 1}, {"": "cuda:1"}])
def test_a_number_is_a_cuda_device(monkeypatch, device_map):
    monkeypatch.setattr(devices, "check_device", lambda device: None)
    assert choose_device(device_map) == "cuda:1"


@pytest.mark.parametrize(
    "device", ["nonsense", "cuda:-1", "cuda:99", -1, 99, "0", "", "CPU", True, 1.5, [0], "meta"]
)
def test_a_device_that_is_not_there_is_refused(device):
    for device_map in (device, {"": device}):
        with pytest.raises(ValueError, match="^device is .*, which PyTorch cannot use here; auto"):
            choose_device(device_map)


@pytest.mark.parametrize(
    "device_map", ["balanced", "sequential", {}, {"": 0, "lm_head": 1}, {"lm_head": "cpu"}]
)
def test_a_model_is_not_divided_among_devices(device_map):
    with pytest.raises(ValueError, match="^device_map divides the model among devices, which is"):
        choose_device(device_map)


def test_loading_refuses_a_device_before_it_reads_weights(spoiled):
    (spoiled / "model.safetensors").write_text("not read")
    with pytest.raises(ValueError, match="^device is 'nonsense', which PyTorch cannot use here"):
        from_pretrained(spoiled, "nonsense")
