"""Loading a checkpoint directory: layouts, names, and error messages."""

import json
import os
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file

from af3 import AudioFlamingo3ForConditionalGeneration
from checkpoints import (
    change_json,
    change_section,
    change_tensors,
    read_json,
    write_original,
    write_sharded,
)
from load_weights import read_config
from places import TINY
from plumbing import devices
from plumbing.devices import choose_device
from plumbing.tokenizer_files import read_token_ids
from processor import AudioFlamingo3Processor
from signals import conversation, sound

from_pretrained = AudioFlamingo3ForConditionalGeneration.from_pretrained

# ---- Layouts ----


def test_shards_are_read_through_their_index(spoiled, model):
    write_sharded(spoiled)
    tensors = from_pretrained(spoiled, "cpu").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensors[name], tensor)


def test_weights_saved_next_to_older_shards_cause_a_warning(spoiled):
    single = (spoiled / "model.safetensors").read_bytes()
    write_sharded(spoiled)
    for shard in spoiled.glob("model-*.safetensors"):
        os.utime(shard, (1000, 1000))
    (spoiled / "model.safetensors").write_bytes(single)
    with pytest.warns(UserWarning, match=r"model\.safetensors is newer than model-00001-of-00002"):
        from_pretrained(spoiled, "cpu")
    os.utime(spoiled / "model.safetensors", (900, 900))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_pretrained(spoiled, "cpu")


def test_the_original_layout_gives_the_same_logits(micro, tmp_path, model, processor):
    write_original(micro, tmp_path / "af3")
    original_model = from_pretrained(tmp_path / "af3", "cpu")
    original_processor = AudioFlamingo3Processor.from_pretrained(tmp_path / "af3")
    chat = conversation(sound(20000))
    batch = processor.apply_chat_template(chat, add_generation_prompt=True)
    original_batch = original_processor.apply_chat_template(chat, add_generation_prompt=True)
    assert original_model.config == model.config
    assert original_model.generation_config == model.generation_config
    assert torch.equal(original_batch["input_ids"], batch["input_ids"])
    assert torch.equal(original_model(**original_batch).logits, model(**batch).logits)


def test_parameters_have_the_names_of_the_checkpoint(micro, model):
    assert set(model.state_dict()) == set(load_file(micro / "model.safetensors"))


def test_the_dtype_is_the_checkpoints_unless_another_is_asked_for(spoiled):
    def round_tensors(tensors):
        for name in tensors:
            tensors[name] = tensors[name].bfloat16()

    change_tensors(spoiled, round_tensors)
    assert from_pretrained(spoiled, "cpu").dtype == torch.bfloat16
    assert from_pretrained(spoiled, "cpu", torch.float16).dtype == torch.float16
    parameters = from_pretrained(spoiled, "cpu", "float32").parameters()
    assert {parameter.dtype for parameter in parameters} == {torch.float32}


def test_an_unknown_dtype_is_refused(micro):
    with pytest.raises(ValueError, match="dtype is 'nonsense'"):
        from_pretrained(micro, "cpu", "nonsense")


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
def test_a_device_that_is_not_there_is_refused(micro, device):
    with pytest.raises(ValueError, match="^device is .*, which PyTorch cannot use here; auto"):
        from_pretrained(micro, device)
    with pytest.raises(ValueError, match="^device is .*, which PyTorch cannot use here; auto"):
        from_pretrained(micro, {"": device})


@pytest.mark.parametrize(
    "device_map", ["balanced", "sequential", {}, {"": 0, "lm_head": 1}, {"lm_head": "cpu"}]
)
def test_a_model_is_not_divided_among_devices(micro, device_map):
    with pytest.raises(ValueError, match="^device_map divides the model among devices, which is"):
        from_pretrained(micro, device_map=device_map)


def test_tiny_is_smaller_than_16_megabytes():
    total = 0
    for file in TINY.rglob("*"):
        if file.is_file() and "__pycache__" not in file.parts:
            total += file.stat().st_size
    assert total < 16e6


# ---- Configuration ----


def read_text_config(folder) -> dict:
    return read_config(folder, read_token_ids(folder))["text_config"]


@pytest.mark.parametrize("spelling", ["flat", "nested"])
def test_the_rotary_base_is_read_in_both_spellings(spoiled, spelling):
    config = read_json(spoiled / "config.json")
    del config["text_config"]["rope_parameters"]
    if spelling == "flat":
        config["text_config"]["rope_theta"] = 5e5
    else:
        config["text_config"]["rope_parameters"] = {"rope_theta": 5e5}
    change_json(spoiled / "config.json", **config)
    assert read_text_config(spoiled)["rope_theta"] == 5e5


def test_a_missing_rotary_base_has_the_default_of_transformers(spoiled):
    change_section(spoiled / "config.json", "text_config", rope_parameters=None)
    assert read_text_config(spoiled)["rope_theta"] == 10000


def test_generation_options_come_from_the_generation_config(spoiled):
    change_json(spoiled / "generation_config.json", eos_token_id=7, repetition_penalty=1.5)
    options = from_pretrained(spoiled, "cpu").generation_config
    assert options.eos_token_id == 7
    assert options.repetition_penalty == 1.5
    assert options.max_new_tokens == 512
    assert options.do_sample is False


def test_without_a_generation_config_end_and_padding_are_the_tokenizers(spoiled, processor):
    (spoiled / "generation_config.json").unlink()
    options = from_pretrained(spoiled, "cpu").generation_config
    assert options.eos_token_id == processor.tokenizer.eos_token_id
    assert options.pad_token_id == processor.tokenizer.pad_token_id


def test_a_named_token_may_be_an_object(spoiled):
    change_json(spoiled / "tokenizer_config.json", eos_token={"content": "<|im_end|>"})
    tokenizer = AudioFlamingo3Processor.from_pretrained(spoiled).tokenizer
    assert tokenizer.eos_token_id == tokenizer.added_tokens["<|im_end|>"]
    assert from_pretrained(spoiled, "cpu")


# ---- Faults ----


def test_every_missing_unexpected_and_misshapen_tensor_is_reported(spoiled):
    def spoil(tensors):
        tensors["audio_tower.layers.9.fc1.bias"] = torch.zeros(3)
        del tensors["language_model.model.norm.weight"]
        tensors["multi_modal_projector.linear_1.bias"] = torch.zeros(47)

    change_tensors(spoiled, spoil)
    with pytest.raises(ValueError) as error:
        from_pretrained(spoiled)
    message = str(error.value)
    assert "\n" not in message
    assert str(spoiled) in message
    assert 'Missing key(s) in state_dict: "language_model.model.norm.weight"' in message
    assert 'Unexpected key(s) in state_dict: "audio_tower.layers.9.fc1.bias"' in message
    assert "multi_modal_projector.linear_1.bias" in message
    assert "[47]" in message
    assert "[48]" in message


def test_integer_tensors_are_reported(spoiled):
    def spoil(tensors):
        tensors["audio_tower.layer_norm.bias"] = torch.zeros(32, dtype=torch.int8)

    change_tensors(spoiled, spoil)
    with pytest.raises(ValueError, match=r"audio_tower\.layer_norm\.bias"):
        from_pretrained(spoiled)


def test_a_truncated_shard_is_reported(spoiled):
    write_sharded(spoiled)
    shard = spoiled / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors: .*file not fully"):
        from_pretrained(spoiled)


def test_a_missing_shard_is_reported(spoiled):
    write_sharded(spoiled)
    (spoiled / "model-00002-of-00002.safetensors").unlink()
    message = r"model-00002-of-00002\.safetensors: no such file"
    with pytest.raises(ValueError, match=message):
        from_pretrained(spoiled)


def test_a_tokenizer_without_the_sound_token_is_refused(spoiled):
    path = spoiled / "tokenizer.json"
    path.write_text(path.read_text().replace('"<sound>"', '"<noise>"'))
    with pytest.raises(ValueError, match="<sound>"):
        from_pretrained(spoiled)
    with pytest.raises(ValueError, match="<sound>"):
        AudioFlamingo3Processor.from_pretrained(spoiled)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused_with_both_sizes(spoiled, model):
    size = model.config.text_config.vocab_size
    change_section(spoiled / "config.json", "text_config", vocab_size=size - 1)
    with pytest.raises(ValueError, match=rf"vocab_size is {size - 1} .* has {size} tokens"):
        from_pretrained(spoiled)


def test_a_tokenizer_with_a_gap_in_its_ids_is_refused(spoiled, model):
    tokens = read_json(spoiled / "tokenizer.json")["added_tokens"]
    tokens.append(tokens[-1] | {"id": tokens[-1]["id"] + 5, "content": "<late>"})
    change_json(spoiled / "tokenizer.json", added_tokens=tokens)
    size = model.config.text_config.vocab_size
    change_section(spoiled / "config.json", "text_config", vocab_size=size + 64)
    with pytest.raises(ValueError, match="vocab_size"):
        from_pretrained(spoiled)


@pytest.fixture
def padded(spoiled, model):
    """A checkpoint with 64 ids more than it has tokens; their logits are often the largest."""

    def pad(tensors):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            weight = tensors[f"language_model.{name}"]
            tensors[f"language_model.{name}"] = torch.cat([weight, 9 * weight[:64]])

    change_tensors(spoiled, pad)
    size = model.config.text_config.vocab_size
    change_section(spoiled / "config.json", "text_config", vocab_size=size + 64)
    return spoiled


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "repetition_penalty": 1.3}])
def test_an_id_without_a_token_is_never_generated(padded, model, processor, options):
    batch = processor(["Hi", "Ho"], [sound(4000), sound(9000)])
    padded_model = from_pretrained(padded, "cpu")
    size = model.config.text_config.vocab_size
    last_logits = padded_model(**batch).logits[:, -1]
    assert (last_logits.argmax(-1) >= size).any()  # it would be generated
    ids = padded_model.generate(**batch, max_new_tokens=20, eos_token_id=[], **options)
    assert ids.max() < size


def test_padding_the_vocabulary_does_not_change_the_other_logits(padded, model, processor):
    batch = processor("Hi", sound(4000))
    size = model.config.text_config.vocab_size
    assert torch.equal(
        from_pretrained(padded, "cpu")(**batch).logits[..., :size], model(**batch).logits
    )


@pytest.mark.parametrize(
    "section, fields",
    [
        ("text_config", {"partial_rotary_factor": 1.0}),
        ("text_config", {"rope_scaling": {"rope_type": "default"}}),
        ("text_config", {"rope_scaling": {"type": "default", "factor": 1.0}}),
        ("text_config", {"layer_types": ["full_attention", "full_attention"]}),
        ("text_config", {"sliding_window": 4096, "use_sliding_window": False}),
        ("audio_config", {"scale_embedding": False, "dropout": 0.1}),
    ],
)
def test_a_field_that_changes_nothing_is_accepted(spoiled, model, section, fields):
    change_section(spoiled / "config.json", section, **fields)
    assert from_pretrained(spoiled, "cpu").config == model.config


def test_a_leftover_tensor_of_early_music_flamingo_files_is_skipped_there_alone(
    spoiled, music_flamingo, tmp_path
):
    def add(tensors):
        tensors["audio_tower.pos_emb.freqs"] = torch.zeros(4)

    music = shutil.copytree(music_flamingo, tmp_path / "music")
    change_tensors(music, add)
    change_tensors(spoiled, add)
    assert from_pretrained(music, "cpu").rotary_time is not None
    with pytest.raises(ValueError, match="audio_tower.pos_emb.freqs"):
        from_pretrained(spoiled, "cpu")


@pytest.mark.parametrize(
    "section, field, value, named",
    [
        ("audio_config", "activation_function", "relu", "activation_function"),
        ("text_config", "hidden_act", "gelu", "hidden_act"),
        ("text_config", "rope_parameters", {"rope_type": "yarn"}, "rope_type"),
        ("text_config", "rope_scaling", {"rope_type": "yarn"}, "rope_scaling"),
        ("text_config", "partial_rotary_factor", 0.5, "partial_rotary_factor"),
        ("text_config", "layer_types", ["sliding_attention", "full_attention"], "layer_types"),
        ("text_config", "num_hidden_layers", 0, "num_hidden_layers"),
        ("audio_config", "hidden_size", -32, "hidden_size"),
        ("text_config", "hidden_size", "48", "hidden_size"),
        ("audio_config", "num_attention_heads", 5, "hidden_size"),
    ],
)
def test_a_field_that_configures_another_network_is_reported(spoiled, section, field, value, named):
    change_section(spoiled / "config.json", section, **{field: value})
    with pytest.raises(ValueError, match=rf"config\.json: {named}"):
        from_pretrained(spoiled)


@pytest.mark.parametrize("content", ["[1, 2]", "not json", json.dumps({"model_type": "voxtral"})])
def test_a_config_of_another_model_is_refused(spoiled, content):
    (spoiled / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json: "):
        from_pretrained(spoiled)
