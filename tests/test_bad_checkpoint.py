"""Checkpoints from strangers: each fault is refused in one line that names the file, and the field or tensor where there is one."""

import json
import os
import pickle
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from af3 import AudioFlamingo3ForConditionalGeneration
from processor import AudioFlamingo3Processor
from signals import sound
from test_load_weights import change, write_sharded


def refusal(folder) -> str:
    """What loading and asking say of it: one line."""
    with pytest.raises((ValueError, OSError)) as caught:
        model = AudioFlamingo3ForConditionalGeneration.from_pretrained(folder)
        list(
            model.stream(
                **AudioFlamingo3Processor.from_pretrained(folder)("Hm?", sound(4000)),
                max_new_tokens=1,
            )
        )
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "file",
    [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "processor_config.json",
    ],
)
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"7", b"null", b"\xff\xfe", b'{"a": 1}]', b"[" * 100]
)
def test_a_file_that_is_no_json_object_is_named(spoilt, file, content):
    (spoilt / file).write_bytes(content)
    assert file in refusal(spoilt)


@pytest.mark.parametrize(
    "section, field, value",
    [
        (section, field, value)
        for section, names in {
            "audio_config": ["hidden_size", "num_hidden_layers", "intermediate_size"],
            "text_config": [
                "vocab_size",
                "num_key_value_heads",
                "rms_norm_eps",
                "max_position_embeddings",
            ],
        }.items()
        for field in names
        for value in (0, -1, 10**12, "x", [1], {}, True)
    ]
    + [
        ("text_config", "hidden_size", 48.5),
        ("text_config", "num_attention_heads", 5),
        ("text_config", "num_key_value_heads", 3),
        ("audio_config", "num_mel_bins", 80),
        ("text_config", "rope_scaling", {"type": "yarn"}),
        ("text_config", "rope_parameters", "x"),
    ],
)
def test_a_size_that_is_none_is_named_with_its_file(spoilt, section, field, value):
    config = json.loads((spoilt / "config.json").read_text())
    change(spoilt / "config.json", **{section: config[section] | {field: value}})
    said = refusal(spoilt)
    assert "config.json" in said and (field in said or field == "rope_parameters")


@pytest.mark.parametrize(
    "file, fields, named",
    [
        ("config.json", {"audio_config": "x"}, "config.json"),
        ("config.json", {"text_config": [1]}, "config.json"),
        ("config.json", {"model_type": "musicflamingo"}, "musicflamingo"),
        ("config.json", {"audio_token_id": 5}, "<sound> is 5"),
        ("generation_config.json", {"eos_token_id": "x"}, "eos_token_id"),
        ("generation_config.json", {"pad_token_id": [[1]]}, "pad_token_id"),
        ("generation_config.json", {"do_sample": "no"}, "do_sample"),
        ("processor_config.json", {"feature_extractor": "x"}, "processor_config.json"),
        ("generation_config.json", {"temperature": "hot"}, "temperature"),
        ("generation_config.json", {"top_k": 0.5}, "top_k"),
        ("processor_config.json", {"max_audio_len": None}, "processor_config.json"),
        ("processor_config.json", {"feature_extractor": {"n_fft": 512}}, "n_fft"),
        ("tokenizer_config.json", {"pad_token": 7}, "pad_token"),
        ("tokenizer_config.json", {"eos_token": {"content": ["x"]}}, "eos_token"),
        ("tokenizer.json", {"model": {}}, "vocab"),
        ("tokenizer.json", {"added_tokens": [{}]}, "content"),
        ("tokenizer.json", {"pre_tokenizer": None}, "tokenizer.json"),
    ],
)
def test_a_field_of_the_wrong_kind_is_named(spoilt, file, fields, named):
    change(spoilt / file, **fields)
    assert named in refusal(spoilt)


def test_merges_out_of_order_or_missing_are_refused(spoilt):
    tokenizer = json.loads((spoilt / "tokenizer.json").read_text())
    for merges in (tokenizer["model"]["merges"][::-1], [["a"]], ["x y z"], 7):
        change(spoilt / "tokenizer.json", model=tokenizer["model"] | {"merges": merges})
        assert "tokenizer.json" in refusal(spoilt)


def test_a_tokenizer_of_a_million_ids_is_not_this_models(spoilt):
    tokenizer = json.loads((spoilt / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"] | {f"word{i}": 1000 + i for i in range(10**6)}
    change(spoilt / "tokenizer.json", model=tokenizer["model"] | {"vocab": vocabulary})
    assert "tokenizer.json" in refusal(spoilt)


@pytest.mark.parametrize(
    "weight_map",
    [
        None,
        7,
        [],
        "x",
        {"a": "../../etc/passwd"},
        {"a": "/etc/passwd"},
        {"a": ".."},
        {"a": ""},
        {"a": None},
        {"a": "pytorch_model.bin"},
        {"a": "x\\y.safetensors"},
    ],
)
def test_an_index_names_plain_safetensors_files_or_is_refused(spoilt, weight_map):
    write_sharded(spoilt)
    change(spoilt / "model.safetensors.index.json", weight_map=weight_map)
    assert "model.safetensors.index.json" in refusal(spoilt)


def test_a_file_cut_at_any_kind_of_place_or_with_a_lying_header_is_named(spoilt):
    path = spoilt / "model.safetensors"
    whole = path.read_bytes()
    header = struct.unpack("<Q", whole[:8])[0]
    lies = [
        struct.pack("<Q", n) + whole[8:]
        for n in (0, 1, header - 1, header + 1, 2**31, 2**63, 2**64 - 1)
    ]
    table = json.loads(whole[8 : 8 + header])
    first, second = [name for name in table if name != "__metadata__"][:2]
    for name, fields in (
        (first, {"dtype": "F7"}),
        (first, {"shape": [-1]}),
        (second, {"data_offsets": table[first]["data_offsets"]}),
        (first, {"data_offsets": [5, 1]}),
    ):
        text = json.dumps(table | {name: table[name] | fields}).encode()
        lies.append(struct.pack("<Q", len(text)) + text + whole[8 + header :])
    for content in [
        whole[:at]
        for at in (
            0,
            1,
            7,
            8,
            9,
            8 + header // 2,
            7 + header,
            8 + header,
            9 + header,
            len(whole) - 1,
        )
    ] + lies:
        path.write_bytes(content)
        assert "model.safetensors" in refusal(spoilt)


def test_a_directory_a_link_to_itself_and_a_pickle_in_the_place_of_weights_are_refused(spoilt):
    path = spoilt / "model.safetensors"
    path.unlink()
    assert "model.safetensors" in refusal(spoilt)
    path.mkdir()
    assert "model.safetensors" in refusal(spoilt)
    path.rmdir()
    path.symlink_to(path)
    assert "model.safetensors" in refusal(spoilt)
    path.unlink()

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(spoilt / "executed"),)

    path.write_bytes(pickle.dumps(Bomb()))
    assert "model.safetensors" in refusal(spoilt) and not (spoilt / "executed").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(spoilt, name):
    (spoilt / name).unlink()
    os.mkfifo(spoilt / name)
    assert name in refusal(spoilt)


@pytest.mark.parametrize(
    "token, id",
    [
        ("<|im_start|>", 5000),
        ("<|im_start|>", -4),
        ("<|im_start|>", "7"),
        ("[PAD]", 620),
        ("[PAD]", 10**30),
    ],
)
def test_token_ids_with_a_gap_or_a_double_are_refused(spoilt, token, id):
    tokenizer = json.loads((spoilt / "tokenizer.json").read_text())
    added = [
        entry | ({"id": id} if entry["content"] == token else {})
        for entry in tokenizer["added_tokens"]
    ]
    change(spoilt / "tokenizer.json", added_tokens=added)
    assert "json" in refusal(spoilt)


def test_weights_that_are_not_numbers_are_named_when_they_are_first_used(spoilt):
    tensors = load_file(spoilt / "model.safetensors")
    tensors["language_model.model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, spoilt / "model.safetensors")
    assert "language_model.model.layers.1.mlp.up_proj.weight" in refusal(spoilt)
