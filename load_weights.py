"""Audio Flamingo 3, the checkpoint: a directory in, its configuration and its tensors out.

The same model is published in two layouts:

    hub       nvidia/audio-flamingo-3-hf: one config.json, one set of safetensors files
    original  nvidia/audio-flamingo-3: the folders llm/, sound_tower/ and sound_mm_projector/,
              each with its own config.json and safetensors files, and older names

In both, fields and tensors are returned under the names that af3.py uses.
plumbing/find_checkpoint.py finds the directory; plumbing/check_checkpoint.py checks its files.
"""

from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from plumbing.chat_template import read_system_message
from plumbing.check_checkpoint import (
    check_generation_file,
    check_is_complete,
    check_model_type,
    check_processor_file,
    check_section,
    check_supported,
    check_vocabulary,
    check_weight_map,
    names_to_read,
    warn_about_newer_file,
)
from plumbing.json_file import errors_naming, read_fields, read_json
from plumbing.tokenizer_files import read_named_ids, read_token_ids

ORIGINAL_FOLDERS = ("llm", "sound_tower", "sound_mm_projector")


def is_original_layout(folder: Path) -> bool:
    return (folder / "llm").is_dir()


def tokenizer_folder(folder: Path) -> Path:
    """The folder with the tokenizer's files and generation_config.json."""
    return folder / "llm" if is_original_layout(folder) else folder


# ---- Configuration ----

# Keys that the original layout spells as Whisper does.
OLDER_KEYS = {
    "d_model": "hidden_size",
    "encoder_layers": "num_hidden_layers",
    "encoder_attention_heads": "num_attention_heads",
    "encoder_ffn_dim": "intermediate_size",
}


def read_configs(folder: Path) -> tuple[dict, dict]:
    """The fields of `AudioFlamingo3Config` and of `GenerationConfig`, among others."""
    token_ids = read_token_ids(tokenizer_folder(folder))
    return read_config(folder, token_ids), read_generation_config(folder, token_ids)


def read_config(folder: Path, token_ids: dict[str, int]) -> dict:
    """Reads config.json and returns a dict with the four keys of `AudioFlamingo3Config`.

    If the file describes another network, raises ValueError, which reports the field.
    """
    from extras import music_flamingo

    path = folder / "config.json"
    config = read_json(path)
    check_model_type(config, path)
    check_supported(config, path)
    if is_original_layout(folder):
        audio_path = folder / "sound_tower" / "config.json"
        text_path = folder / "llm" / "config.json"
        sections = {"audio_config": read_json(audio_path), "text_config": read_json(text_path)}
    else:
        audio_path = text_path = path
        sections = config

    text_config = read_section(sections.get("text_config", {}), text_path)
    # All official files give it. If a file does not, transformers uses 10000, and so do we.
    text_config.setdefault("rope_theta", 10000.0)
    audio_token_id = config.get("audio_token_id", token_ids.get("<sound>"))
    check_vocabulary(text_config.get("vocab_size"), audio_token_id, token_ids, text_path)
    rotary_time = read_section(music_flamingo.rotary_time_section(config), path)
    return {
        "audio_config": read_section(sections.get("audio_config", {}), audio_path),
        "text_config": text_config,
        "audio_token_id": audio_token_id,
        "num_tokens": len(token_ids),
        "rotary_time_config": music_flamingo.read_rotary_time_config(rotary_time),
    }


def read_section(section: dict, path: Path) -> dict:
    """A section of a config.json with newer key names, and rope parameters at its top level."""
    with errors_naming(path):
        section = {**section, **(section.get("rope_parameters") or {})}
    renamed = {}
    for key, value in section.items():
        if value is not None:
            renamed[OLDER_KEYS.get(key, key)] = value
    check_section(renamed, path)
    return renamed


def read_generation_config(folder: Path, token_ids: dict[str, int]) -> dict:
    """The options in generation_config.json, and the tokenizer's ids for end and padding."""
    folder = tokenizer_folder(folder)
    path = folder / "generation_config.json"
    options = read_named_ids(folder, token_ids) | read_fields(path)
    check_generation_file(options, path)
    return options


SYSTEM_MESSAGE = "You are a helpful assistant."  # if chat_template.jinja has no other


def read_processor_config(folder: Path, added_tokens: dict[str, int]) -> dict:
    """The arguments of `AudioFlamingo3Processor` beside the tokenizer."""
    from extras import music_flamingo

    path = folder / "processor_config.json"
    config = read_json(path) if path.exists() else {}
    check_processor_file(config, folder)
    with errors_naming(path):
        settings = {"max_audio_len": 600}  # seconds
        model_config = read_fields(folder / "config.json")
        settings |= music_flamingo.read_processor_settings(model_config, config, added_tokens)
    for key in ("max_audio_len", "default_transcription_prompt"):
        if key in config:
            settings[key] = config[key]
    return settings | {"system_message": read_system_message(folder, config, SYSTEM_MESSAGE)}


# ---- Tensors ----

# Prefixes of tensor names in other files, and in af3.py; the first match wins. The hub layout has
# the names of af3.py.
ORIGINAL_NAMES = {  # each begins with the name of its folder
    "sound_tower.audio_tower.": "audio_tower.",  # in some files with the module's own name
    "sound_tower.": "audio_tower.",
    "sound_mm_projector.layers.0.": "multi_modal_projector.linear_1.",
    "sound_mm_projector.layers.2.": "multi_modal_projector.linear_2.",  # layers.1 is the GELU
    "llm.": "language_model.",
}
TRANSFORMERS_5_NAMES = {  # in adapters that were trained with transformers 5
    "model.audio_tower.": "audio_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}


def model_name(name: str) -> str:
    """The name in af3.py of a tensor."""
    for beginning, own in (ORIGINAL_NAMES | TRANSFORMERS_5_NAMES).items():
        if name.startswith(beginning):
            return own + name.removeprefix(beginning)
    return name


LARGE_TENSOR = 1 << 20  # bytes


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(name in af3.py, tensor) for every tensor in the checkpoint.

    Tensors are memory-mapped: a page is read from disk when it is first used. A large tensor has
    its own mapping, so that its memory is freed with it, for example when it is quantized.
    """
    parts = ORIGINAL_FOLDERS if is_original_layout(folder) else ("",)
    for part in parts:
        for path in find_shards(folder / part):
            check_is_complete(path)
            with errors_naming(path):
                shard = safe_open(path, "pt")
                for name in names_to_read(shard.keys(), folder):
                    tensor = shard.get_tensor(name)
                    if tensor.nbytes > LARGE_TENSOR:
                        tensor = safe_open(path, "pt").get_tensor(name)
                    yield model_name(f"{part}.{name}" if part else name), tensor


def find_shards(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those in its index, else model.safetensors."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    weight_map = read_json(index).get("weight_map")
    check_weight_map(weight_map, index)
    shards = [folder / name for name in sorted(set(weight_map.values()))]
    warn_about_newer_file(folder / "model.safetensors", shards)
    return shards
