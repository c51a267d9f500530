"""Audio Flamingo 3, the checkpoint: a directory or hub name in, dictionaries and tensors out.

In this order: finding the directory, reading its configuration, reading its tensors, the checks.
This file knows nothing of the network; `from_pretrained` in af3.py and processor.py calls it.

The same model is published in two layouts:

    hub       nvidia/audio-flamingo-3-hf: one config.json, one set of safetensors files
    original  nvidia/audio-flamingo-3: the folders llm/, sound_tower/ and sound_mm_projector/,
              each with its own config.json and safetensors files, and older names
"""

import json
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

ORIGINAL_FOLDERS = ("llm", "sound_tower", "sound_mm_projector")

# The hub repository holds the weights twice, as one file and as shards. These are the shards.
DOWNLOAD_FILES = '"*.json" "*.jinja" "model-*-of-*.safetensors"'
DOWNLOAD_COMMAND = f"hf download nvidia/audio-flamingo-3-hf --include {DOWNLOAD_FILES}"

# ---- Finding the directory ----


def find_checkpoint(name: str | Path) -> Path:
    """The directory `name`, or the newest snapshot of hub model `name` in the local hub cache.

    Nothing is downloaded. Raises FileNotFoundError with the command that does it.
    """
    if str(name) and Path(name).is_dir():
        check_is_checkpoint(Path(name))
        return Path(name)
    cache = hub_cache()
    model = cache / f"models--{str(name).replace('/', '--')}"
    main = model / "refs" / "main"  # holds the commit hash of the newest snapshot
    if main.is_file():
        snapshot = model / "snapshots" / main.read_text().strip()
        if snapshot.is_dir():
            return snapshot
    if not re.fullmatch(r"[\w-]+/[\w.-]+", str(name)):  # it is no name on the hub
        raise FileNotFoundError(f"{str(name)!r}: no such directory; a checkpoint is expected.")
    raise FileNotFoundError(
        f"{name}: no such directory, and no such model in {cache}. "
        f"To download the official one: {DOWNLOAD_COMMAND}"
    )


def hub_cache() -> Path:
    """The folder in which the `hf` program keeps models, as its documentation defines it."""
    if os.environ.get("HF_HUB_CACHE"):
        return Path(os.environ["HF_HUB_CACHE"])
    if os.environ.get("HF_HOME"):
        return Path(os.environ["HF_HOME"]) / "hub"
    return Path.home() / ".cache" / "huggingface" / "hub"


def is_original_layout(folder: Path) -> bool:
    return (folder / "llm").is_dir()


def tokenizer_folder(folder: Path) -> Path:
    """Where the tokenizer's files and generation_config.json are."""
    if is_original_layout(folder):
        return folder / "llm"
    return folder


# ---- Reading the configuration ----

# Older names of configuration keys, as Whisper and the original layout spell them.
OLDER_KEYS = {
    "d_model": "hidden_size",
    "encoder_layers": "num_hidden_layers",
    "encoder_attention_heads": "num_attention_heads",
    "encoder_ffn_dim": "intermediate_size",
}


def read_config(folder: Path, token_ids: dict[str, int]) -> dict:
    """{"audio_config": {...}, "text_config": {...}, "audio_token_id": ...,
    "rotary_time_config": {...} or None} of a checkpoint.

    Keys have one spelling, whatever the layout. `token_ids` are the tokenizer's, from
    `read_token_ids`. Raises ValueError, naming file and field, where the checkpoint needs
    another network or another tokenizer.
    """
    path = folder / "config.json"
    config = read_json(path)
    check_model_type(config, path)
    check_supported(config, path)
    if is_original_layout(folder):
        audio_path = folder / "sound_tower" / "config.json"
        text_path = folder / "llm" / "config.json"
        audio_config = read_json(audio_path)
        text_config = read_json(text_path)
    else:
        audio_path = path
        text_path = path
        audio_config = config.get("audio_config", {})
        text_config = config.get("text_config", {})

    audio_config = with_one_spelling(audio_config, audio_path)
    text_config = with_one_spelling(text_config, text_path)
    # Where the file is silent, transformers assumes 10000, which is not Audio Flamingo 3's 1e6.
    text_config.setdefault("rope_theta", 10000.0)
    check_supported(audio_config, audio_path)
    check_supported(text_config, text_path)
    check_sizes(audio_config, audio_path)
    check_sizes(text_config, text_path)

    audio_token_id = config.get("audio_token_id", token_ids.get("<sound>"))
    check_vocabulary(text_config.get("vocab_size"), audio_token_id, token_ids, text_path)
    return {
        "audio_config": audio_config,
        "text_config": text_config,
        "audio_token_id": audio_token_id,
        "rotary_time_config": read_rotary_time_config(config, path),
    }


def read_rotary_time_config(config: dict, path: Path) -> dict | None:
    """The top level of Music Flamingo's config.json; None for Audio Flamingo 3.

    Here, rope_parameters belong to the rotary time embedding, not to the decoder. head_dim and
    max_position_embeddings are left out: transformers ignores them, too.
    """
    if not is_music_flamingo(config):
        return None
    values = with_one_spelling(config, path)
    kept = ("rope_type", "rope_theta", "partial_rotary_factor", "audio_frame_step")
    values = {key: values[key] for key in kept if key in values}
    check_supported(values, path)
    check_sizes(values, path)
    return values


def is_music_flamingo(config: dict) -> bool:
    """Whether it is Music Flamingo 2601 or Audio Flamingo Next; both have this model_type."""
    return config.get("model_type") == "musicflamingo"


def with_one_spelling(section: dict, path: Path) -> dict:
    """A section of a config.json: newer key names, no nested rope parameters, no empty values."""
    with errors_naming(path):
        section = {**section, **(section.get("rope_parameters") or {})}
    renamed = {}
    for key, value in section.items():
        if value is not None:
            renamed[OLDER_KEYS.get(key, key)] = value
    return renamed


def is_quantized(name: str | Path) -> bool:
    """Whether a checkpoint's weights are; extras/quantize.py reads those that it has written."""
    return "quantization_config" in read_json(find_checkpoint(name) / "config.json")


def read_generation_config(folder: Path, token_ids: dict[str, int]) -> dict:
    """The options in generation_config.json; ids of the end and of padding that it does not
    give are the tokenizer's."""
    path = folder / "generation_config.json"
    options = read_named_ids(folder, token_ids)
    if path.exists():
        for key, value in read_json(path).items():
            if value is not None:
                options[key] = value
    return options


def read_token_ids(folder: Path) -> dict[str, int]:
    """The id of every token in tokenizer.json."""
    path = folder / "tokenizer.json"
    tokenizer = read_json(path)
    with errors_naming(path):
        token_ids = dict(tokenizer["model"]["vocab"])
        for token in tokenizer["added_tokens"]:
            token_ids[token["content"]] = token["id"]
    return token_ids


def read_named_ids(folder: Path, token_ids: dict[str, int]) -> dict[str, int]:
    """pad_token_id and eos_token_id, of the tokens that tokenizer_config.json names."""
    path = folder / "tokenizer_config.json"
    config = read_json(path)
    named_ids = {}
    for key in ("pad_token", "eos_token"):
        token = config.get(key)
        if isinstance(token, dict):  # a token may also be an object with its text in "content"
            token = token.get("content")
        check_named_token(key, token, token_ids, path)
        named_ids[f"{key}_id"] = token_ids[token]
    return named_ids


def read_system_message(folder: Path, default: str) -> str:
    """What chat_template.jinja says first in a conversation without a system message of its own.

    Nothing else in the published files differs, so no template engine is needed.
    """
    path = folder / "chat_template.jinja"
    check_is_file(path)
    if not path.exists():
        return default
    with errors_naming(path):
        template = path.read_text(encoding="utf-8")
    # Inside a string of the template, the line end is written as a backslash and an n.
    message = re.search(r"<\|im_start\|>system(?:\n|\\n)(.*?)<\|im_end\|>", template, re.DOTALL)
    if message is None or re.search(r"\{[{%]", message[1]):  # {{ and {% are Jinja's
        raise ValueError(f"{path}: no system message as plain text inside; it is not supported.")
    return message[1]


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises OSError or ValueError, naming the file."""
    check_is_there(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); download it again.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a JSON object is expected.")
    return content


# ---- Reading the tensors ----

# How tensor names begin elsewhere, and how the same names begin in the model. The first that fits
# counts, so a longer one stands before a shorter one. The hub layout has the model's own names.
TRANSFORMERS_5_NAMES = {
    "model.audio_tower.": "audio_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}
ORIGINAL_NAMES = {
    "sound_tower.audio_tower.": "audio_tower.",
    "sound_tower.": "audio_tower.",
    "sound_mm_projector.layers.0.": "multi_modal_projector.linear_1.",
    "sound_mm_projector.layers.2.": "multi_modal_projector.linear_2.",  # layers.1 is the GELU
    "llm.": "language_model.",
}

SHARED_MAPPING = 1 << 20  # bytes; larger tensors get a memory mapping of their own


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(name in the model, tensor) of every tensor in the checkpoint.

    Tensors are memory-mapped: a page is read from disk when it is first used. A large tensor has
    a mapping of its own, so that its pages leave memory with it, for example when it is quantised.
    """
    parts = ORIGINAL_FOLDERS if is_original_layout(folder) else ("",)
    for part in parts:
        for path in find_shards(folder / part):
            check_is_there(path)
            check_is_complete(path)
            with errors_naming(path):
                shard = safe_open(path, "pt")
                for name in shard.keys():
                    tensor = shard.get_tensor(name)
                    if tensor.nbytes > SHARED_MAPPING:
                        tensor = safe_open(path, "pt").get_tensor(name)
                    full_name = f"{part}.{name}" if part else name
                    yield model_name(full_name), tensor


def find_shards(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those that its index names, else model.safetensors."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    weight_map = read_json(index).get("weight_map")
    check_weight_map(weight_map, index)
    shards = [folder / name for name in sorted(set(weight_map.values()))]
    warn_about_newer_file(folder / "model.safetensors", shards)
    return shards


def warn_about_newer_file(single: Path, shards: list[Path]) -> None:
    """Somebody may have saved trained weights beside the shards, which are what is read."""
    existing = [shard.stat().st_mtime for shard in shards if shard.exists()]
    if single not in shards and single.exists() and existing:
        if single.stat().st_mtime > max(existing):
            warnings.warn(
                f"{single} is newer than {shards[0].name} and the other shards, which are read; "
                "remove what you do not want."
            )


def model_name(name: str) -> str:
    """The model's name for a tensor that a checkpoint or an adapter spells in its own way."""
    name = name.removeprefix("base_model.model.")  # peft wraps the model twice
    for spelling, own in (TRANSFORMERS_5_NAMES | ORIGINAL_NAMES).items():
        if name.startswith(spelling):
            return own + name.removeprefix(spelling)
    return name


# ---- Checks: a ValueError in one line that names the file ----

# In the hub layout the first two, in the original one the last.
MODEL_TYPES = ("audioflamingo3", "musicflamingo", "llava_llama")

# The network has these values built in.
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

# Largest values that are taken for sizes of a real model.
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
    "partial_rotary_factor": 0.5,  # each angle rotates two channels
    "audio_frame_step": 1.0,
}


@contextmanager
def errors_naming(path: Path) -> Iterator[None]:
    """Turns any error inside into a ValueError of one line that names `path`."""
    try:
        yield
    except Exception as error:
        reason = shorten(str(error))
        if str(path) in reason:
            raise ValueError(reason) from None
        if not isinstance(error, (ValueError, RuntimeError, OSError)):
            reason = f"unexpected content ({error!r})"
        raise ValueError(f"{path}: {reason}") from None


def shorten(message: str) -> str:
    """A message in one line: of many tensors that are wrong, only the first few."""
    lines = message.splitlines()
    if len(lines) > 6:
        lines = [*lines[:3], f"... and {len(lines) - 3} more."]
    return " ".join(" ".join(line.split())[:500] for line in lines)


def check_is_checkpoint(folder: Path) -> None:
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise ValueError(
            f"{folder}: a LoRA adapter; give it as --adapter, with its base as --model."
        )
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder}: no config.json inside; a checkpoint is expected.")


def check_is_file(path: Path) -> None:
    """Refuses what exists and is not a file, such as a pipe, which would be waited for."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: not a file.")


def check_is_there(path: Path) -> None:
    check_is_file(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; the checkpoint is not complete.")


def check_is_complete(path: Path) -> None:
    """Refuses a safetensors file that is cut off, as an interrupted download leaves it."""
    try:
        safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or not complete ({error}); download it again.") from None


def check_model_type(config: dict, path: Path) -> None:
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"{path}: model_type is {model_type!r}; "
            "an audioflamingo3 or musicflamingo checkpoint is expected."
        )


def check_supported(section: dict, path: Path) -> None:
    for key, value in SUPPORTED.items():
        if section.get(key, value) != value:
            raise ValueError(f"{path}: {key} is {section[key]!r}; only {value!r} is supported.")


def check_sizes(section: dict, path: Path) -> None:
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


def check_vocabulary(vocab_size, audio_token_id, token_ids: dict[str, int], path: Path) -> None:
    sound_id = token_ids.get("<sound>")
    without_gaps = set(token_ids.values()) == set(range(len(token_ids)))
    if vocab_size != len(token_ids) or audio_token_id != sound_id or not without_gaps:
        raise ValueError(
            f"{path}: vocab_size is {vocab_size} and <sound> is {audio_token_id}; "
            f"tokenizer.json beside it has {len(token_ids)} tokens, "
            f"of which <sound> is {sound_id}."
        )


def check_named_token(key: str, token, token_ids: dict[str, int], path: Path) -> None:
    """Refuses a tokenizer without the token that its configuration names, or without ours."""
    needed = [token, "<sound>", "<|im_start|>", "<|im_end|>"]
    if not isinstance(token, str) or not all(name in token_ids for name in needed):
        raise ValueError(
            f"{path}: {key} is {token!r}; tokenizer.json beside it must have that token, "
            "<sound>, <|im_start|> and <|im_end|>."
        )


def check_weight_map(weight_map, index: Path) -> None:
    """Refuses file names that would lead out of the folder, and other kinds of file."""
    names = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\]+\.safetensors", name):
            raise ValueError(
                f"{index}: weight_map names {name!r}; "
                "names of safetensors files beside the index are expected."
            )
