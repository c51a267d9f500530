"""Untrusted checkpoints: each fault is refused in one line that contains the file and, if there is
one, the field or tensor. Nothing in a checkpoint is executed."""

import json
import os
import pickle
import struct
from copy import copy

import pytest
import torch

from af3 import AudioFlamingo3ForConditionalGeneration
from checkpoints import change_json, change_section, change_tensors, read_json, write_sharded
from processor import AudioFlamingo3Processor
from signals import sound


def refusal(folder) -> str:
    """Returns the error of loading the checkpoint and asking a question; it must be one line."""
    with pytest.raises((ValueError, OSError)) as caught:
        model = AudioFlamingo3ForConditionalGeneration.from_pretrained(folder)
        processor = AudioFlamingo3Processor.from_pretrained(folder)
        model.generate(**processor("Hm?", sound(4000)), max_new_tokens=1)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- JSON files ----


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
def test_a_file_that_does_not_contain_a_json_object_is_reported(spoiled, file, content):
    (spoiled / file).write_bytes(content)
    assert file in refusal(spoiled)


AUDIO_SIZES = ["hidden_size", "num_hidden_layers", "intermediate_size"]
TEXT_SIZES = ["vocab_size", "num_key_value_heads", "rms_norm_eps", "max_position_embeddings"]


@pytest.mark.parametrize("value", [0, -1, 10**12, "x", [1], {}, True], ids=str)
@pytest.mark.parametrize(
    "section, field",
    [("audio_config", field) for field in AUDIO_SIZES]
    + [("text_config", field) for field in TEXT_SIZES],
)
def test_an_invalid_size_is_reported_with_its_field_and_file(spoiled, section, field, value):
    change_section(spoiled / "config.json", section, **{field: value})
    message = refusal(spoiled)
    assert "config.json" in message
    assert field in message


@pytest.mark.parametrize(
    "section, field, value, named",
    [
        ("text_config", "hidden_size", 48.5, "hidden_size"),
        ("text_config", "num_attention_heads", 5, "num_attention_heads"),
        ("text_config", "num_key_value_heads", 3, "num_key_value_heads"),
        ("audio_config", "num_mel_bins", 80, "num_mel_bins"),
        ("text_config", "rope_scaling", {"type": "yarn"}, "rope_scaling"),
        ("text_config", "rope_parameters", "x", "config.json"),
    ],
)
def test_a_section_of_another_network_is_reported(spoiled, section, field, value, named):
    change_section(spoiled / "config.json", section, **{field: value})
    message = refusal(spoiled)
    assert "config.json" in message
    assert named in message


@pytest.mark.parametrize(
    "file, fields, named",
    [
        ("config.json", {"audio_config": "x"}, "config.json"),
        ("config.json", {"text_config": [1]}, "config.json"),
        ("config.json", {"model_type": "voxtral"}, "voxtral"),
        ("config.json", {"audio_token_id": 5}, "<sound> is 5"),
        ("generation_config.json", {"eos_token_id": "x"}, "eos_token_id"),
        ("generation_config.json", {"pad_token_id": [[1]]}, "pad_token_id"),
        ("generation_config.json", {"do_sample": "no"}, "do_sample"),
        ("generation_config.json", {"temperature": "hot"}, "temperature"),
        ("generation_config.json", {"top_k": 0.5}, "top_k"),
        ("processor_config.json", {"feature_extractor": "x"}, "processor_config.json"),
        ("processor_config.json", {"feature_extractor": {"n_fft": 512}}, "n_fft"),
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
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(spoiled, "cpu")
    assert (model.generation_config.top_k, model.generation_config.top_p) == (20, 0.8)
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
        AudioFlamingo3ForConditionalGeneration.from_pretrained(spoiled, "cpu")
    [warning] = caught
    assert "generation_config.json" in str(warning.message)
    assert f"{field} {value!r}" in str(warning.message)


def test_options_of_sampling_may_be_anything_where_nothing_is_sampled(spoiled):
    options = {"do_sample": False, "temperature": 0.0, "top_k": -1, "top_p": 0.0}
    change_json(spoiled / "generation_config.json", **options)
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(spoiled, "cpu")
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


def test_a_tokenizer_with_a_million_additional_tokens_is_refused(spoiled):
    path = spoiled / "tokenizer.json"
    vocabulary = read_json(path)["model"]["vocab"]
    for number in range(10**6):
        vocabulary[f"word{number}"] = 1000 + number
    change_section(path, "model", vocab=vocabulary)
    assert "tokenizer.json" in refusal(spoiled)


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
    assert "json" in refusal(spoiled)


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
