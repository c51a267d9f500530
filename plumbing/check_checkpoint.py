"""Checks of a checkpoint's files: a ValueError of one line that names the file, and the field or
tensor if there is one."""

import re
import warnings
from pathlib import Path

from safetensors import SafetensorError, safe_open

from plumbing.check_inputs import check_generation_options
from plumbing.download import how_to_replace
from plumbing.find_checkpoint import find_checkpoint
from plumbing.json_file import check_exists, check_name_is_utf_8, errors_naming, read_json
from plumbing.transformers_conventions import NEUTRAL_OPTIONS, is_neutral_option

# ---- config.json ----

# The first two are in the hub layout, the last in the original one.
MODEL_TYPES = ("audioflamingo3", "musicflamingo", "llava_llama")

# The only values that the network in af3.py computes.
SUPPORTED = {
    "activation_function": "gelu",
    "hidden_act": "silu",
    "projector_hidden_act": "gelu",
    "projector_bias": True,
    "scale_embedding": False,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "rope_type": "default",
    "rope_scaling": None,
    "num_mel_bins": 128,
    "max_source_positions": 1500,
}

# The largest values that a real model may have.
LARGEST_SIZES = {
    "hidden_size": 1 << 24,
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 24,
    "num_key_value_heads": 1 << 24,
    "intermediate_size": 1 << 24,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 24,
    "rms_norm_eps": 1.0,
    "rope_theta": 1e12,
    "audio_frame_step": 1.0,
}


def check_model_type(config: dict, path: Path) -> None:
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"{path}: model_type is {model_type!r}; "
            "an audioflamingo3 or musicflamingo checkpoint is expected."
        )


def check_supported(config: dict, path: Path) -> None:
    for key, value in SUPPORTED.items():
        if config.get(key, value) != value and not is_plain_rope(key, config[key]):
            raise ValueError(f"{path}: {key} is {config[key]!r}; only {value!r} is supported.")
    layer_types = config.get("layer_types") or []
    if not isinstance(layer_types, list) or set(map(str, layer_types)) - {"full_attention"}:
        raise ValueError(f"{path}: layer_types is not full_attention for every layer.")


def is_plain_rope(key: str, value) -> bool:
    """Whether rope_scaling, the older name of rope_parameters, scales nothing."""
    if key != "rope_scaling" or not isinstance(value, dict):
        return False
    return value.get("rope_type", value.get("type", "default")) == "default"


def check_section(section: dict, path: Path) -> None:
    """Refuses a section of a config.json that describes another network, or no network."""
    check_supported(section, path)
    check_rotary_factor(section, path)
    for key, largest in LARGEST_SIZES.items():
        value = section.get(key, largest)
        kinds = (int,) if isinstance(largest, int) else (int, float)
        if type(value) not in kinds or not 0 < value <= largest:
            kind = kinds[-1].__name__
            raise ValueError(
                f"{path}: {key} is {value!r}; {kind} above 0 and up to {largest} is expected."
            )
    hidden_size = section.get("hidden_size", 0)
    heads = section.get("num_attention_heads", 1)
    key_value_heads = section.get("num_key_value_heads", 1)
    if hidden_size % heads or heads % key_value_heads:
        raise ValueError(
            f"{path}: hidden_size is no multiple of num_attention_heads, "
            "or that is no multiple of num_key_value_heads."
        )


def check_rotary_factor(section: dict, path: Path) -> None:
    """The decoder rotates all channels; rotary time, in Music Flamingo, rotates two per angle."""
    value = section.get("partial_rotary_factor", 0.2)
    if section.get("model_type") == "musicflamingo":
        if type(value) not in (int, float) or not 0 < value <= 0.5:
            raise ValueError(
                f"{path}: partial_rotary_factor is {value!r}; float above 0 and up to 0.5 is expected."
            )
    elif "partial_rotary_factor" in section and value != 1:
        raise ValueError(f"{path}: partial_rotary_factor is {value!r}; only 1.0 is supported.")


def check_vocabulary(vocab_size, audio_token_id, token_ids: dict[str, int], path: Path) -> None:
    """Refuses a tokenizer of another model. Rows for ids without a token may follow the others."""
    sound_id = token_ids.get("<sound>")
    without_gaps = set(token_ids.values()) == set(range(len(token_ids)))
    has_room = isinstance(vocab_size, int) and vocab_size >= len(token_ids)
    if not has_room or audio_token_id != sound_id or not without_gaps:
        raise ValueError(
            f"{path}: vocab_size is {vocab_size} and <sound> is {audio_token_id}; "
            f"tokenizer.json beside it has {len(token_ids)} tokens, "
            f"of which <sound> is {sound_id}."
        )


def is_quantized(name: str | Path) -> bool:
    """Whether a checkpoint's weights are quantized; extras/quantize.py reads its own files."""
    return "quantization_config" in read_json(find_checkpoint(name) / "config.json")


# ---- generation_config.json, processor_config.json ----


def check_generation_file(options: dict, path: Path) -> None:
    with errors_naming(path):
        check_generation_options(options)
    warn_about_ignored_options(options, path)


def warn_about_ignored_options(options: dict, path: Path) -> None:
    ignored = []
    for name, value in options.items():
        is_replaced = name == "max_length" and "max_new_tokens" in options
        if name in NEUTRAL_OPTIONS and not is_neutral_option(name, value) and not is_replaced:
            ignored.append(f"{name} {value!r}")
    if ignored:
        warnings.warn(f"{path}: not supported, and without effect here: {', '.join(ignored)}.")


# The values that are constants in processor.py.
FEATURE_EXTRACTOR = {
    "sampling_rate": 16000,
    "chunk_length": 30,
    "feature_size": 128,
    "n_fft": 400,
    "hop_length": 160,
    "dither": 0,
    "do_normalize": False,
    "padding_side": "right",
    "padding_value": 0,
}


def check_feature_extractor(config: dict, folder: Path) -> None:
    """Refuses features that are not those of processor.py.

    config: that of processor_config.json. An older checkpoint has preprocessor_config.json instead.
    """
    path = folder / "processor_config.json"
    values = config.get("feature_extractor")
    if values is None and (folder / "preprocessor_config.json").exists():
        path = folder / "preprocessor_config.json"
        values = read_json(path)
    with errors_naming(path):
        for key, value in FEATURE_EXTRACTOR.items():
            if values is not None and values.get(key, value) != value:
                raise ValueError(f"{key} is {values[key]}; this model's is {value}.")


def check_processor_file(config: dict, folder: Path) -> None:
    """Refuses a processor_config.json of another processor; config: its fields."""
    check_feature_extractor(config, folder)
    path = folder / "processor_config.json"
    if config.get("audio_token", "<sound>") != "<sound>":
        raise ValueError(f"{path}: audio_token is {config['audio_token']!r}; <sound> is expected.")
    prompt = config.get("default_transcription_prompt", "")
    if not isinstance(prompt, str):
        raise ValueError(f"{path}: default_transcription_prompt is {prompt!r}; text is expected.")
    check_max_audio_len(config.get("max_audio_len", 600), path)


def check_max_audio_len(seconds, path: Path) -> None:
    if not isinstance(seconds, (int, float)) or not 0 < seconds < 1e6:
        raise ValueError(f"{path}: max_audio_len is {seconds!r}; seconds above 0 are expected.")


# ---- Tensors ----


def names_to_read(names: list[str], folder: Path) -> list[str]:
    """All names, without a tensor that early Music Flamingo files have and no network reads."""
    leftover = "audio_tower.pos_emb.freqs"
    if leftover not in names or not is_music_flamingo(folder):
        return names
    return [name for name in names if name != leftover]


def is_music_flamingo(folder: Path) -> bool:
    return read_json(folder / "config.json").get("model_type") == "musicflamingo"


def check_is_complete(path: Path) -> None:
    """Refuses a safetensors file that is absent or cut off, as after an interrupted download."""
    shards = list(path.parent.glob("model-*-of-*.safetensors"))
    if path.name == "model.safetensors" and not path.exists() and shards:
        check_exists(path.with_name("model.safetensors.index.json"))
    check_exists(path)
    check_name_is_utf_8(path)
    try:
        safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(
            f"{path}: damaged or not complete ({error}).{how_to_replace(path)}"
        ) from None


def check_weight_map(weight_map, index: Path) -> None:
    """Refuses file names that would lead out of the folder, and other kinds of file."""
    names = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\]+\.safetensors", name):
            raise ValueError(
                f"{index}: weight_map names {name!r}; "
                "names of safetensors files beside the index are expected."
            )


def warn_about_newer_file(single: Path, shards: list[Path]) -> None:
    """Somebody may have saved trained weights beside the shards, which are what is read."""
    existing = [shard.stat().st_mtime for shard in shards if shard.exists()]
    if single not in shards and single.exists() and existing:
        if single.stat().st_mtime > max(existing):
            warnings.warn(
                f"{single} is newer than {shards[0].name} and the other shards, which are read; "
                "remove what you do not want."
            )
