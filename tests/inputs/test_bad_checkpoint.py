"""Untrusted checkpoints: each fault is refused in one line that contains the file and, if there is
one, the field or tensor. Nothing in a checkpoint is executed.

Faults that break a rule of the model, such as another activation function, are in tests/spec/.
"""

import json
import os
import pickle
import shutil
import struct
import warnings
from copy import copy

import pytest
import torch

from af3 import AudioFlamingo3Config, AudioFlamingo3ForConditionalGeneration
from checkpoints import change_json, change_section, change_tensors, read_json, write_sharded
from load_weights import read_configs
from plumbing.json_file import from_known_keys
from processor import AudioFlamingo3Processor
from signals import sound


def load(folder):
    return AudioFlamingo3ForConditionalGeneration.from_pretrained(folder, "cpu")


def refusal(folder) -> str:
    """Returns the error of loading the checkpoint and asking a question; it must be one line."""
    with pytest.raises((ValueError, OSError)) as caught:
        model = load(folder)
        processor = AudioFlamingo3Processor.from_pretrained(folder)
        model.generate(**processor("Hm?", sound(4000)), max_new_tokens=1)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- JSON files ----


FILES = [
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    "processor_config.json",
]
NO_OBJECTS = [b"", b"{", b"[]", b"7", b"null", b"\xff\xfe", b'{"a": 1}]', b"[" * 100]


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_is_not_json_is_reported(spoiled, file):
    (spoiled / file).write_bytes(b"{")
    assert file in refusal(spoiled)


@pytest.mark.parametrize("content", NO_OBJECTS)
def test_a_file_that_does_not_contain_a_json_object_is_reported(spoiled, content):
    (spoiled / "config.json").write_bytes(content)
    assert "config.json" in refusal(spoiled)


@pytest.mark.parametrize(
    "section, field",
    [
        ("audio_config", "hidden_size"),
        ("audio_config", "num_hidden_layers"),
        ("audio_config", "intermediate_size"),
        ("text_config", "vocab_size"),
        ("text_config", "num_key_value_heads"),
        ("text_config", "rms_norm_eps"),
        ("text_config", "max_position_embeddings"),
    ],
)
def test_an_invalid_size_is_reported_with_its_field(spoiled, section, field):
    change_section(spoiled / "config.json", section, **{field: -1})
    assert f"config.json: {field} is -1; " in refusal(spoiled)


@pytest.mark.parametrize("value", [0, 10**12, "x", [1], {}, True], ids=str)
def test_an_invalid_size_is_reported_whatever_it_is(spoiled, value):
    change_section(spoiled / "config.json", "audio_config", hidden_size=value)
    assert f"config.json: hidden_size is {value!r}; " in refusal(spoiled)


@pytest.mark.parametrize(
    "section, field, value, named",
    [
        ("text_config", "hidden_size", 48.5, "hidden_size is 48.5"),
        ("text_config", "num_attention_heads", 5, "num_attention_heads"),
        ("text_config", "num_key_value_heads", 3, "num_key_value_heads"),
        ("audio_config", "num_attention_heads", 5, "num_attention_heads"),
        ("text_config", "rope_scaling", {"type": "yarn"}, "rope_scaling is"),
        ("text_config", "rope_scaling", {"rope_type": "yarn"}, "rope_scaling is"),
        ("text_config", "partial_rotary_factor", 0.5, "partial_rotary_factor is 0.5"),
        ("text_config", "layer_types", ["sliding_attention", "full_attention"], "layer_types"),
        ("text_config", "rope_parameters", "x", "config.json"),
    ],
)
def test_a_section_of_another_network_is_reported(spoiled, section, field, value, named):
    change_section(spoiled / "config.json", section, **{field: value})
    message = refusal(spoiled)
    assert "config.json" in message
    assert named in message


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
    config = from_known_keys(AudioFlamingo3Config, read_configs(spoiled)[0])
    assert config == model.config


@pytest.mark.parametrize(
    "file, fields, named",
    [
        ("config.json", {"audio_config": "x"}, "config.json"),
        ("config.json", {"text_config": [1]}, "config.json"),
        ("config.json", {"model_type": "voxtral"}, "voxtral"),
        ("generation_config.json", {"eos_token_id": "x"}, "eos_token_id"),
        ("generation_config.json", {"pad_token_id": [[1]]}, "pad_token_id"),
        ("generation_config.json", {"do_sample": "no"}, "do_sample"),
        ("generation_config.json", {"temperature": "hot"}, "temperature"),
        ("generation_config.json", {"top_k": 0.5}, "top_k"),
        ("processor_config.json", {"feature_extractor": "x"}, "processor_config.json"),
        ("processor_config.json", {"feature_extractor": {"do_normalize": True}}, "do_normalize"),
        ("processor_config.json", {"feature_extractor": {"padding_side": "left"}}, "padding_side"),
        ("processor_config.json", {"audio_token": "<audio>"}, "audio_token is '<audio>'"),
        ("processor_config.json", {"default_transcription_prompt": 5}, "prompt is 5"),
        ("processor_config.json", {"max_audio_len": None}, "processor_config.json"),
        ("tokenizer_config.json", {"pad_token": 7}, "pad_token"),
        ("tokenizer_config.json", {"eos_token": {"content": ["x"]}}, "eos_token"),
        ("tokenizer.json", {"model": {}}, "vocab"),
        ("tokenizer.json", {"added_tokens": [{}]}, "content"),
        ("tokenizer.json", {"pre_tokenizer": None}, "tokenizer.json"),
    ],
)
def test_a_field_of_the_wrong_type_is_reported(spoiled, file, fields, named):
    change_json(spoiled / file, **fields)
    assert named in refusal(spoiled)


def test_a_named_token_may_be_an_object(spoiled):
    change_json(spoiled / "tokenizer_config.json", eos_token={"content": "<|im_end|>"})
    (spoiled / "generation_config.json").unlink()
    assert read_configs(spoiled)[1]["eos_token_id"] == 620
    assert AudioFlamingo3Processor.from_pretrained(spoiled).tokenizer.eos_token_id == 620


# As the published conversion script for this model writes them.
PUBLISHED_OPTIONS = {
    "bos_token_id": 1,
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.8,
    "repetition_penalty": 1.05,
    "transformers_version": "5.0.0",
    "num_beams": 1,
    "min_p": None,
    "suppress_tokens": [],
    "max_length": 100,
    "max_new_tokens": 20,
}


def test_options_that_change_nothing_are_read_without_a_warning(spoiled, recwarn):
    change_json(spoiled / "generation_config.json", **PUBLISHED_OPTIONS)
    options = read_configs(spoiled)[1]
    assert (options["top_k"], options["top_p"]) == (20, 0.8)
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize(
    "field, value",
    [
        ("begin_suppress_tokens", [1]),
        ("bad_words_ids", [[1, 2]]),
        ("forced_eos_token_id", 5),
        ("max_length", 20),
        ("min_length", 3),
        ("min_new_tokens", 3),
        ("min_p", 0.1),
        ("no_repeat_ngram_size", 2),
        ("num_beams", 4),
        ("stop_strings", ["."]),
        ("suppress_tokens", [1]),
        ("typical_p", 0.9),
    ],
)
def test_a_generation_option_without_effect_here_is_warned_about(spoiled, field, value):
    change_json(spoiled / "generation_config.json", **{field: value})
    with pytest.warns(UserWarning) as caught:
        read_configs(spoiled)
    [warning] = caught
    assert "generation_config.json" in str(warning.message)
    assert f"{field} {value!r}" in str(warning.message)


def test_options_of_sampling_may_be_anything_where_nothing_is_sampled(spoiled):
    options = {"do_sample": False, "temperature": 0.0, "top_k": -1, "top_p": 0.0}
    change_json(spoiled / "generation_config.json", **options)
    model = load(spoiled)
    with pytest.raises(ValueError, match="temperature is 0.0"):
        model.generate(torch.tensor([[1, 2]]), do_sample=True)


@pytest.mark.parametrize("merges", ["reversed", [["a"]], ["x y z"], 7])
def test_merges_out_of_order_or_missing_are_refused(spoiled, merges):
    path = spoiled / "tokenizer.json"
    if merges == "reversed":
        merges = read_json(path)["model"]["merges"][::-1]
    change_section(path, "model", merges=merges)
    assert "tokenizer.json" in refusal(spoiled)


def add_token(folder, token: str, token_id: int) -> None:
    path = folder / "tokenizer.json"
    vocabulary = read_json(path)["model"]["vocab"]
    change_section(path, "model", vocab=vocabulary | {token: token_id})


def test_a_tokenizer_without_the_sound_token_is_refused(spoiled):
    path = spoiled / "tokenizer.json"
    path.write_text(path.read_text().replace('"<sound>"', '"<noise>"'))
    with pytest.raises(ValueError, match="<sound>"):
        load(spoiled)
    with pytest.raises(ValueError, match="<sound>"):
        AudioFlamingo3Processor.from_pretrained(spoiled)


def test_a_tokenizer_with_a_gap_in_its_ids_is_refused(spoiled, model):
    tokens = read_json(spoiled / "tokenizer.json")["added_tokens"]
    tokens.append(tokens[-1] | {"id": tokens[-1]["id"] + 5, "content": "<late>"})
    change_json(spoiled / "tokenizer.json", added_tokens=tokens)
    size = model.config.text_config.vocab_size
    change_section(spoiled / "config.json", "text_config", vocab_size=size + 64)
    with pytest.raises(ValueError, match="vocab_size"):
        load(spoiled)


@pytest.mark.parametrize("token, token_id", [("twice", 300), ("twice", 0)])
def test_two_tokens_with_the_same_id_are_refused(spoiled, token, token_id):
    add_token(spoiled, token, token_id)
    message = refusal(spoiled)
    assert "tokenizer.json" in message
    assert f"'twice' have the same id, {token_id}" in message


def test_two_added_tokens_with_the_same_id_are_refused(spoiled):
    tokens = read_json(spoiled / "tokenizer.json")["added_tokens"]
    tokens.append(tokens[-1] | {"content": "<twice>"})
    change_json(spoiled / "tokenizer.json", added_tokens=tokens)
    assert "'<twice>' have the same id" in refusal(spoiled)


def test_a_byte_without_a_token_is_refused(spoiled):
    path = spoiled / "tokenizer.json"
    vocabulary = read_json(path)["model"]["vocab"]
    del vocabulary["!"]
    change_section(path, "model", vocab=vocabulary)
    with pytest.raises(ValueError, match="tokenizer.json: only 255 of the 256 bytes have a token"):
        AudioFlamingo3Processor.from_pretrained(spoiled)


def test_a_panic_of_tiktoken_is_one_line_with_the_file(processor):
    panic = type("PanicException", (BaseException,), {})

    class Broken:
        def encode_ordinary(self, text):
            raise panic("no entry found for key")

    tokenizer = copy(processor.tokenizer)
    tokenizer.bpe = Broken()
    with pytest.raises(ValueError, match=r"tokenizer\.json: .*no entry found for key"):
        tokenizer.encode("a")


@pytest.mark.parametrize(
    "token, token_id",
    [
        ("<|im_start|>", 5000),
        ("<|im_start|>", -4),
        ("<|im_start|>", "7"),
        ("[PAD]", 620),
        ("[PAD]", 10**30),
    ],
)
def test_token_ids_with_a_gap_or_used_twice_are_refused(spoiled, token, token_id):
    path = spoiled / "tokenizer.json"
    added_tokens = read_json(path)["added_tokens"]
    for entry in added_tokens:
        if entry["content"] == token:
            entry["id"] = token_id
    change_json(path, added_tokens=added_tokens)
    message = refusal(spoiled)
    assert "config.json: vocab_size is 647 " in message or "tokenizer.json: " in message


# ---- Tensors ----


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
def test_an_index_may_refer_only_to_safetensors_files_in_its_directory(spoiled, weight_map):
    write_sharded(spoiled)
    change_json(spoiled / "model.safetensors.index.json", weight_map=weight_map)
    assert "model.safetensors.index.json" in refusal(spoiled)


def test_every_missing_unexpected_and_misshapen_tensor_is_reported(spoiled):
    def spoil(tensors):
        tensors["audio_tower.layers.9.fc1.bias"] = torch.zeros(3)
        del tensors["language_model.model.norm.weight"]
        tensors["multi_modal_projector.linear_1.bias"] = torch.zeros(47)

    change_tensors(spoiled, spoil)
    with pytest.raises(ValueError) as error:
        load(spoiled)
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
        load(spoiled)


def test_a_truncated_shard_is_reported(spoiled):
    write_sharded(spoiled)
    shard = spoiled / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors: .*file not fully"):
        load(spoiled)


def test_a_missing_shard_is_reported(spoiled):
    write_sharded(spoiled)
    (spoiled / "model-00002-of-00002.safetensors").unlink()
    message = r"model-00002-of-00002\.safetensors: no such file"
    with pytest.raises(ValueError, match=message):
        load(spoiled)


def test_weights_saved_next_to_older_shards_cause_a_warning(spoiled):
    single = (spoiled / "model.safetensors").read_bytes()
    write_sharded(spoiled)
    for shard in spoiled.glob("model-*.safetensors"):
        os.utime(shard, (1000, 1000))
    (spoiled / "model.safetensors").write_bytes(single)
    with pytest.warns(UserWarning, match=r"model\.safetensors is newer than model-00001-of-00002"):
        load(spoiled)
    os.utime(spoiled / "model.safetensors", (900, 900))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(spoiled)


def test_a_leftover_tensor_of_early_music_flamingo_files_is_skipped_there_alone(
    spoiled, families, tmp_path
):
    def add(tensors):
        tensors["audio_tower.pos_emb.freqs"] = torch.zeros(4)

    music = shutil.copytree(families["music"], tmp_path / "music")
    change_tensors(music, add)
    change_tensors(spoiled, add)
    assert load(music).rotary_time is not None
    with pytest.raises(ValueError, match="audio_tower.pos_emb.freqs"):
        load(spoiled)


def split_safetensors(content: bytes) -> tuple[dict, bytes]:
    """Returns the header of a safetensors file and the bytes of its tensors."""
    (table_size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + table_size]), content[8 + table_size :]


def test_a_truncated_safetensors_file_is_reported(spoiled):
    path = spoiled / "model.safetensors"
    whole = path.read_bytes()
    (table_size,) = struct.unpack("<Q", whole[:8])
    end = 8 + table_size
    for length in (0, 1, 7, 8, 9, end // 2, end - 1, end, end + 1, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert "model.safetensors" in refusal(spoiled)


def test_a_safetensors_file_with_a_wrong_header_size_is_reported(spoiled):
    path = spoiled / "model.safetensors"
    whole = path.read_bytes()
    (table_size,) = struct.unpack("<Q", whole[:8])
    for size in (0, 1, table_size - 1, table_size + 1, 2**31, 2**63, 2**64 - 1):
        path.write_bytes(struct.pack("<Q", size) + whole[8:])
        assert "model.safetensors" in refusal(spoiled)


@pytest.mark.parametrize(
    "fields",
    [{"dtype": "F7"}, {"shape": [-1]}, {"data_offsets": "first"}, {"data_offsets": [5, 1]}],
    ids=str,
)
def test_a_safetensors_file_with_an_invalid_entry_is_reported(spoiled, fields):
    path = spoiled / "model.safetensors"
    table, values = split_safetensors(path.read_bytes())
    first, second = [name for name in table if name != "__metadata__"][:2]
    if fields.get("data_offsets") == "first":
        fields = {"data_offsets": table[first]["data_offsets"]}
    table[second] |= fields
    text = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + values)
    assert "model.safetensors" in refusal(spoiled)


def test_missing_weights_a_directory_and_a_link_to_itself_are_refused(spoiled):
    path = spoiled / "model.safetensors"
    path.unlink()
    assert "model.safetensors" in refusal(spoiled)
    path.mkdir()
    assert "model.safetensors" in refusal(spoiled)
    path.rmdir()
    path.symlink_to(path)
    assert "model.safetensors" in refusal(spoiled)


class Bomb:
    """Creates a directory when it is unpickled."""

    def __init__(self, directory):
        self.directory = directory

    def __reduce__(self):
        return os.mkdir, (self.directory,)


def test_a_pickle_in_place_of_the_weights_is_refused_and_not_executed(spoiled):
    directory = spoiled / "executed"
    (spoiled / "model.safetensors").write_bytes(pickle.dumps(Bomb(str(directory))))
    assert "model.safetensors" in refusal(spoiled)
    assert not directory.exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_pipe_in_place_of_a_file_is_refused_without_waiting(spoiled, name):
    (spoiled / name).unlink()
    os.mkfifo(spoiled / name)
    assert name in refusal(spoiled)


def test_a_tensor_that_is_not_finite_is_reported_when_it_is_first_used(spoiled):
    name = "language_model.model.layers.1.mlp.up_proj.weight"

    def spoil(tensors):
        tensors[name][3, 5] = torch.nan

    change_tensors(spoiled, spoil)
    assert name in refusal(spoiled)
