"""Modifies checkpoint directories for the tests."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def change_json(path: Path, **fields) -> None:
    path.write_text(json.dumps(read_json(path) | fields))


def change_section(path: Path, section: str, **fields) -> None:
    """Changes fields of an object inside a JSON file."""
    change_json(path, **{section: read_json(path)[section] | fields})


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Calls `change` with the tensors of a checkpoint and saves the result."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_sharded(folder: Path) -> None:
    """Splits model.safetensors into two shards and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate([names[:30], names[30:]], start=1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard)
        for name in part:
            weight_map[name] = shard
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# For each folder of the original layout, the prefix of its tensors in the model.
ORIGINAL_PREFIXES = {
    "llm": "language_model.",
    "sound_tower": "audio_tower.",
    "sound_mm_projector": "multi_modal_projector.",
}


def write_original(hub: Path, folder: Path) -> None:
    """Converts a checkpoint from the hub layout to that of nvidia/audio-flamingo-3."""
    config = read_json(hub / "config.json")
    text_config = config["text_config"]
    text_config["rope_theta"] = text_config.pop("rope_parameters")["rope_theta"]
    audio_config = config["audio_config"]
    audio_config["d_model"] = audio_config.pop("hidden_size")
    audio_config["encoder_layers"] = audio_config.pop("num_hidden_layers")
    audio_config["encoder_attention_heads"] = audio_config.pop("num_attention_heads")
    audio_config["encoder_ffn_dim"] = audio_config.pop("intermediate_size")

    configs = {"llm": text_config, "sound_tower": audio_config, "sound_mm_projector": {}}
    tensors = load_file(hub / "model.safetensors")
    for part, prefix in ORIGINAL_PREFIXES.items():
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(configs[part]))
        renamed = {}
        for name, tensor in tensors.items():
            if name.startswith(prefix):
                name = name.removeprefix(prefix)
                name = name.replace("linear_1", "layers.0").replace("linear_2", "layers.2")
                renamed[name] = tensor
        save_file(renamed, folder / part / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llava_llama"}')
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(hub / name, folder / "llm")


# Top-level fields in the config.json of each newer model, in addition to the ids of the borders.
# Both rely on defaults: the period is 1200, and a fraction of 0.2 of the channels has angles.
# Music Flamingo's head_dim is wrong, as in the published file, and must be ignored.
ROTARY_TIME_FIELDS = {
    "music": {"head_dim": 256, "rope_parameters": {"rope_type": "default", "rope_theta": 1200}},
    "next": {"audio_frame_step": 0.01},
}
DECODER_FIELDS = {
    "music": {},
    "next": {
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 15_300_000.0},
    },
}
SYSTEM_MESSAGES = {"music": "You listen to music.", "next": "You listen; words come next."}
BORDERS = ["<|sound_bos|>", "<|sound_eos|>"]


def write_music_flamingo(micro: Path, template: Path, folder: Path, family: str) -> None:
    """Makes a checkpoint of Music Flamingo ("music") or Audio Flamingo Next ("next") from `micro`.

    The two additional tokens, the borders of a recording, have random embeddings. `template` is
    the path of a chat_template.jinja.
    """
    shutil.copytree(micro, folder)
    tokenizer = read_json(folder / "tokenizer.json")
    added_tokens = tokenizer["added_tokens"]
    vocab_size = added_tokens[-1]["id"] + 1
    for number, token in enumerate(BORDERS):
        added_tokens.append(added_tokens[-1] | {"id": vocab_size + number, "content": token})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))

    change_section(
        folder / "config.json",
        "text_config",
        vocab_size=vocab_size + len(BORDERS),
        **DECODER_FIELDS[family],
    )
    change_json(
        folder / "config.json",
        model_type="musicflamingo",
        architectures=["MusicFlamingoForConditionalGeneration"],
        audio_bos_token_id=vocab_size,
        audio_eos_token_id=vocab_size + 1,
        **ROTARY_TIME_FIELDS[family],
    )
    names = dict(zip(("audio_bos_token", "audio_eos_token"), BORDERS))
    processor_class = "MusicFlamingoProcessor"
    change_json(folder / "processor_config.json", processor_class=processor_class, **names)
    processor_config = read_json(folder / "processor_config.json")
    del processor_config["default_transcription_prompt"]
    del processor_config["max_audio_len"]
    (folder / "processor_config.json").write_text(json.dumps(processor_config))
    change_json(folder / "tokenizer_config.json", processor_class=processor_class)
    text = template.read_text().replace("You are a helpful assistant.", SYSTEM_MESSAGES[family])
    (folder / "chat_template.jinja").write_text(text)

    def add_rows(tensors: dict[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(6)
        for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
            rows = torch.randn(len(BORDERS), tensors[name].shape[1], generator=generator)
            tensors[name] = torch.cat([tensors[name], 0.5 * rows])

    change_tensors(folder, add_rows)
