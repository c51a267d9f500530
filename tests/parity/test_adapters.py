"""The numbers and names of peft, for adapters that it saved and for those that are saved here.

They were recorded by make_goldens.py and make_adapter_goldens.py; peft loaded what is saved here.
"""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from adapters import VARIATIONS, save_variation, with_factors
from af3 import AudioFlamingo3ForConditionalGeneration
from checkpoints import change_json
from extras.lora import merge_adapter, save_adapter
from places import DATA
from signals import conversation, sound


@pytest.fixture(scope="module")
def batch(processor):
    chat = conversation(sound(80000))
    return processor.apply_chat_template(chat, add_generation_prompt=True)


@pytest.fixture(scope="module")
def recorded():
    return np.load(DATA / "adapter_goldens.npz")


@pytest.fixture(scope="module")
def plain_logits(model, batch):
    return model(**batch).logits[0, ::29]


def load(folder):
    return AudioFlamingo3ForConditionalGeneration.from_pretrained(folder, "cpu")


@pytest.mark.parametrize("rslora, golden", [(False, "think.logits"), (True, "think_rslora.logits")])
def test_a_merged_adapter_gives_the_logits_of_pefts_own_merge(
    micro, tmp_path, batch, goldens, plain_logits, rslora, golden
):
    think = shutil.copytree(DATA / "think", tmp_path / "think")
    change_json(think / "adapter_config.json", use_rslora=rslora)
    logits = merge_adapter(load(micro), think)(**batch).logits[0, ::29]
    torch.testing.assert_close(logits, goldens[golden], atol=1e-3, rtol=0)
    assert (logits - plain_logits).abs().max() > 0.5


def test_unmerged_factors_give_the_logits_of_peft(micro, batch, recorded, plain_logits):
    logits = with_factors(micro)(**batch).logits[0, ::29]
    expected = torch.from_numpy(recorded["logits"])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert (expected - plain_logits).abs().max() > 0.5


def test_a_saved_adapter_gives_the_logits_of_peft_when_merged(micro, tmp_path, batch, recorded):
    save_adapter(with_factors(micro), tmp_path)
    logits = merge_adapter(load(micro), tmp_path)(**batch).logits[0, ::29]
    expected = torch.from_numpy(recorded["logits"])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", VARIATIONS)
def test_other_fields_of_the_config_are_merged_as_peft_applies_them(
    micro, tmp_path, batch, recorded, name
):
    save_variation(micro, tmp_path, name)
    logits = merge_adapter(load(micro), tmp_path)(**batch).logits[0, -1]
    torch.testing.assert_close(logits, torch.from_numpy(recorded[name]), atol=1e-4, rtol=0)


def test_tensors_are_saved_under_the_names_of_peft(micro, tmp_path, recorded):
    save_adapter(with_factors(micro), tmp_path)
    assert sorted(load_file(tmp_path / "adapter_model.safetensors")) == list(recorded["names"])
