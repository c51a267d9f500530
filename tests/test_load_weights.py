"""A checkpoint directory becomes a model: both layouts, the look-up by name, and what a bad checkpoint gets."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from af3 import AudioFlamingo3ForConditionalGeneration
from conftest import TINY
from load_weights import find_checkpoint
from processor import AudioFlamingo3Processor
from signals import conversation, sound

load = AudioFlamingo3ForConditionalGeneration.from_pretrained


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def write_sharded(folder):
    """The checkpoint's tensors in two shards and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for i, part in enumerate((names[:30], names[30:]), 1):
        shard = f"model-{i:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def write_original(micro, folder):
    """The same weights in the layout of nvidia/audio-flamingo-3, with its older spelling of names and keys."""
    config, tensors = (
        json.loads((micro / "config.json").read_text()),
        load_file(micro / "model.safetensors"),
    )
    older = {
        "hidden_size": "d_model",
        "num_hidden_layers": "encoder_layers",
        "num_attention_heads": "encoder_attention_heads",
        "intermediate_size": "encoder_ffn_dim",
    }
    text = config["text_config"]
    text |= {"rope_theta": text.pop("rope_parameters")["rope_theta"]}
    configs = {
        "llm": text,
        "sound_tower": {older.get(k, k): v for k, v in config["audio_config"].items()},
        "sound_mm_projector": {},
    }
    prefixes = {
        "llm": "language_model.",
        "sound_tower": "audio_tower.",
        "sound_mm_projector": "multi_modal_projector.",
    }
    for part, prefix in prefixes.items():
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(configs[part]))
        save_file(
            {
                name.removeprefix(prefix)
                .replace("linear_1", "layers.0")
                .replace("linear_2", "layers.2"): tensor
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            },
            folder / part / "model.safetensors",
        )
    (folder / "config.json").write_text('{"model_type": "llava_llama"}')
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(micro / name, folder / "llm")


# ---- Layouts ----


def test_shards_are_read_through_their_index(spoilt, model):
    write_sharded(spoilt)
    assert all(
        torch.equal(a, b)
        for a, b in zip(load(spoilt, "cpu").state_dict().values(), model.state_dict().values())
    )


def test_the_original_layout_gives_the_same_answer(micro, tmp_path, model, processor):
    write_original(micro, tmp_path / "af3")
    other, words = (
        load(tmp_path / "af3", "cpu"),
        AudioFlamingo3Processor.from_pretrained(tmp_path / "af3"),
    )
    batch, same = (
        p.apply_chat_template(conversation(sound(20000)), add_generation_prompt=True)
        for p in (processor, words)
    )
    assert torch.equal(batch["input_ids"], same["input_ids"])
    assert torch.equal(model(**batch).logits, other(**same).logits)
    assert other.generation_config == model.generation_config and other.config == model.config


def test_both_spellings_of_the_rotary_base_are_read(spoilt, model):
    config = json.loads((spoilt / "config.json").read_text())
    config["text_config"]["rope_theta"] = config["text_config"].pop("rope_parameters")["rope_theta"]
    change(spoilt / "config.json", text_config=config["text_config"])
    assert load(spoilt, "cpu").config == model.config


def test_parameters_have_the_checkpoints_own_names(micro, model):
    assert set(model.state_dict()) == set(load_file(micro / "model.safetensors"))


def test_the_checkpoints_dtype_is_kept_unless_another_is_asked_for(spoilt):
    change_tensors(
        spoilt,
        lambda tensors: tensors.update(
            {name: tensor.bfloat16() for name, tensor in tensors.items()}
        ),
    )
    assert load(spoilt, "cpu").dtype == torch.bfloat16
    assert {p.dtype for p in load(spoilt, "cpu", "float32").parameters()} == {torch.float32}
    assert load(spoilt, "cpu", torch.float16).dtype == torch.float16
    with pytest.raises(ValueError, match="dtype is 'nonsense'"):
        load(spoilt, "cpu", "nonsense")


def test_end_and_padding_come_from_the_generation_config_else_from_the_tokenizer(spoilt, processor):
    change(spoilt / "generation_config.json", eos_token_id=7, repetition_penalty=1.5)
    config = load(spoilt, "cpu").generation_config
    assert (
        config.eos_token_id,
        config.repetition_penalty,
        config.max_new_tokens,
        config.do_sample,
    ) == (7, 1.5, 512, False)
    (spoilt / "generation_config.json").unlink()
    config = load(spoilt, "cpu").generation_config
    assert (config.eos_token_id, config.pad_token_id) == (
        processor.tokenizer.eos_token_id,
        processor.tokenizer.pad_token_id,
    )


def test_tiny_is_below_16_megabytes():
    assert (
        sum(
            file.stat().st_size
            for file in TINY.rglob("*")
            if file.is_file() and "__pycache__" not in file.parts
        )
        < 16e6
    )


# ---- Names ----


def test_a_hub_name_is_looked_up_in_the_local_cache_through_its_links(micro, tmp_path, monkeypatch):
    cache = tmp_path / "hub" / "models--nvidia--audio-flamingo-3-hf"
    for file in micro.iterdir():
        blob, link = cache / "blobs" / file.name, cache / "snapshots" / "abc" / file.name
        (
            blob.parent.mkdir(parents=True, exist_ok=True),
            link.parent.mkdir(parents=True, exist_ok=True),
        )
        shutil.copy(file, blob)
        link.symlink_to(blob)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    for variable, value in {"HF_HUB_CACHE": tmp_path / "hub", "HF_HOME": tmp_path}.items():
        (
            monkeypatch.delenv("HF_HUB_CACHE", raising=False),
            monkeypatch.delenv("HF_HOME", raising=False),
        )
        monkeypatch.setenv(variable, str(value))
        assert find_checkpoint("nvidia/audio-flamingo-3-hf") == cache / "snapshots" / "abc"
    assert load("nvidia/audio-flamingo-3-hf", "cpu").dtype == torch.float32


def test_an_absent_model_is_refused_with_the_command_that_fetches_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="hf download nvidia/audio-flamingo-3-hf"):
        load("nvidia/audio-flamingo-3-hf")


# ---- Bad checkpoints ----


def test_every_missing_unexpected_and_misshapen_tensor_is_named(spoilt):
    def spoil(tensors):
        tensors["audio_tower.layers.9.fc1.bias"] = torch.zeros(3)
        del tensors["language_model.model.norm.weight"]
        tensors["multi_modal_projector.linear_1.bias"] = torch.zeros(47)

    change_tensors(spoilt, spoil)
    with pytest.raises(ValueError) as error:
        load(spoilt)
    assert "\n" not in str(error.value) and str(spoilt) in str(error.value)
    for part in (
        'Missing key(s) in state_dict: "language_model.model.norm.weight"',
        'Unexpected key(s) in state_dict: "audio_tower.layers.9.fc1.bias"',
        "multi_modal_projector.linear_1.bias",
        "[47]",
        "[48]",
    ):
        assert part in str(error.value)


def test_integer_tensors_are_refused_by_name(spoilt):
    change_tensors(
        spoilt,
        lambda tensors: tensors.update(
            {"audio_tower.layer_norm.bias": torch.zeros(32, dtype=torch.int8)}
        ),
    )
    with pytest.raises(ValueError, match=r"audio_tower\.layer_norm\.bias"):
        load(spoilt)


def test_a_missing_and_a_cut_off_shard_are_named(spoilt):
    write_sharded(spoilt)
    shard = spoilt / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(
        ValueError,
        match=r"model-00002-of-00002\.safetensors: SafetensorError|unexpected content|.*",
    ):
        load(spoilt)
    shard.unlink()
    with pytest.raises(
        ValueError, match=r"No such file or directory: .*model-00002-of-00002\.safetensors"
    ):
        load(spoilt)


def test_a_device_that_is_not_there_is_refused(micro):
    with pytest.raises(ValueError, match="nonsense"):
        load(micro, "nonsense")


def test_a_tokenizer_without_the_sound_token_is_refused(spoilt):
    (spoilt / "tokenizer.json").write_text(
        (spoilt / "tokenizer.json").read_text().replace('"<sound>"', '"<noise>"')
    )
    with pytest.raises(ValueError, match="<sound>"):
        load(spoilt)
    with pytest.raises(ValueError, match="<sound>"):
        AudioFlamingo3Processor.from_pretrained(spoilt)


def test_a_named_token_may_be_an_object(spoilt):
    change(spoilt / "tokenizer_config.json", eos_token={"content": "<|im_end|>"})
    assert AudioFlamingo3Processor.from_pretrained(spoilt).tokenizer.eos_token_id and load(
        spoilt, "cpu"
    )


def test_a_vocabulary_that_is_not_the_tokenizers_is_refused_with_both_sizes(spoilt):
    tokenizer = json.loads((spoilt / "tokenizer.json").read_text())
    change(spoilt / "tokenizer.json", added_tokens=tokenizer["added_tokens"][:-1])
    size = len(tokenizer["model"]["vocab"]) + len(tokenizer["added_tokens"])
    with pytest.raises(ValueError, match=rf"vocab_size is {size} .* has {size - 1} tokens"):
        load(spoilt)


@pytest.mark.parametrize(
    "section, field, value",
    [
        ("audio_config", "activation_function", "relu"),
        ("text_config", "hidden_act", "gelu"),
        ("text_config", "rope_parameters", {"rope_type": "yarn"}),
        ("text_config", "rope_scaling", {"rope_type": "yarn"}),
        ("text_config", "num_hidden_layers", 0),
        ("audio_config", "hidden_size", -32),
        ("text_config", "hidden_size", "48"),
        ("audio_config", "num_attention_heads", 5),
    ],
)
def test_a_configuration_this_network_is_not_is_refused_by_field(spoilt, section, field, value):
    config = json.loads((spoilt / "config.json").read_text())
    change(spoilt / "config.json", **{section: config[section] | {field: value}})
    with pytest.raises(ValueError, match=r"config\.json: (rope_type|hidden_size|" + field + ")"):
        load(spoilt)


@pytest.mark.parametrize("content", ["[1, 2]", "not json", '{"model_type": "musicflamingo"}'])
def test_a_config_that_is_none_is_refused(spoilt, content):
    (spoilt / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json: "):
        load(spoilt)
