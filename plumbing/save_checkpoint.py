"""Checkpoints: a model or a processor in, a directory in the hub layout out.

All files are first written to a temporary folder inside the directory and then moved out of it,
config.json last. A directory without config.json is not a checkpoint. So if the program is
killed, the directory is either complete or refused, never a mixture of old and new files.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from plumbing.devices import shapes_without_memory
from plumbing.json_file import check_name_is_utf_8
from plumbing.replace_file import give_usual_mode

MAX_SHARD_BYTES = 4_500_000_000

SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WEIGHT_FILES = r"model(-\d{5}-of-\d{5})?\.safetensors"

PROCESSOR_FILES = [
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt"),
    *("processor_config.json", "preprocessor_config.json"),
    *("chat_template.jinja", "chat_template.json"),
]

# Contains the official processor_config.json and chat_template.jinja, which transformers needs and
# the original layout lacks.
TINY = Path(__file__).resolve().parent.parent / "tiny"


def save_model(model: nn.Module, path: str | Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Writes weights, config.json and generation_config.json.

    Raises ValueError if layers of the model were replaced, for example by quantization.
    """
    check_is_plain(model)
    write_checkpoint(model, hub_config(model), path, max_shard_bytes)


def write_checkpoint(
    model: nn.Module, config: dict, path: str | Path, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes the tensors of any model, generation_config.json, and `config` as config.json.

    The weights are not copied in memory, except one shard at a time if they are on another device.
    """
    with new_files(path) as folder:
        write_weights(folder, model.state_dict(), max_shard_bytes)
        options = asdict(model.generation_config)
        options["top_k"] = options["top_k"] or 0  # an absent one would be 50
        options = {name: value for name, value in options.items() if value is not None}
        write_json(folder / "generation_config.json", options)
        write_json(folder / "config.json", config)


def save_processor(source: Path, path: str | Path) -> None:
    """Copies the files of a processor from the directory it was loaded from."""
    with new_files(path) as folder:
        for name in PROCESSOR_FILES:
            if (source / name).exists():
                shutil.copyfile(source / name, folder / name)
        if not (folder / "preprocessor_config.json").exists():
            copy_if_missing("processor_config.json", folder)
        copy_if_missing("chat_template.jinja", folder)


def copy_if_missing(name: str, folder: Path) -> None:
    if not (folder / name).exists():
        shutil.copyfile(TINY / name, folder / name)


# ---- Files ----


@contextmanager
def new_files(path: str | Path) -> Iterator[Path]:
    """Yields a temporary folder; when all its files are complete, they are moved to `path`."""
    directory = Path(path)
    check_can_save(directory)
    folder = directory / ".saving"
    shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed
    folder.mkdir(parents=True)
    try:
        yield folder
        replace_files(folder, directory)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def replace_files(folder: Path, directory: Path) -> None:
    """Moves the files of a folder to the directory. New weights replace all older ones.

    A file has the mode of the one that it replaces, or the usual one.
    """
    names = sorted(path.name for path in folder.iterdir())
    for name in names:
        give_usual_mode(folder / name)
        if (directory / name).exists():
            shutil.copymode(directory / name, folder / name)
    if "config.json" in names:
        names.remove("config.json")
        names.append("config.json")  # last, because it makes the directory a checkpoint
        # Weights first: Windows does not remove files that are memory-mapped. Then nothing is lost.
        for old in [*old_weights(directory), directory / INDEX, directory / "config.json"]:
            old.unlink(missing_ok=True)
    for name in names:
        os.replace(folder / name, directory / name)


def old_weights(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if re.fullmatch(WEIGHT_FILES, path.name)]


def write_weights(folder: Path, tensors: dict[str, Tensor], max_shard_bytes: int) -> None:
    """Writes one file of tensors, or several shards and their index."""
    shards = divide_into_shards(tensors, max_shard_bytes)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        if len(shards) == 1:
            file = SINGLE_FILE
        shard = {name: tensors[name].detach().cpu().contiguous() for name in names}
        try:
            save_file(shard, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:  # for example on a full disk
            raise OSError(f"{folder.parent}: {error}") from None
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total_size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        write_json(folder / INDEX, index)


def divide_into_shards(tensors: dict[str, Tensor], max_bytes: int) -> list[list[str]]:
    """Groups the tensors, in order, into shards of at most `max_bytes`; returns their names."""
    shards = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8", newline="\n")


# ---- config.json ----


def hub_config(model: nn.Module) -> dict:
    """Returns the config.json the model was loaded from, or a new one, with the current dtype."""
    config = model.source_config
    if "text_config" not in config:  # the original layout, or a new model
        config = new_config(model)
    config = {**config, "dtype": str(model.dtype).removeprefix("torch.")}
    config.pop("torch_dtype", None)  # its older name
    for section in ("audio_config", "text_config"):
        of_section = {**config.get(section, {})}
        of_section.pop("dtype", None)
        of_section.pop("torch_dtype", None)
        config[section] = of_section
    return config


def new_config(model: nn.Module) -> dict:
    """Builds a config.json for a model that was not loaded from the hub layout."""
    audio_config = asdict(model.config.audio_config)
    audio_config["model_type"] = "audioflamingo3_encoder"
    text_config = asdict(model.config.text_config)
    rope_theta = text_config.pop("rope_theta")
    text_config["rope_parameters"] = {"rope_theta": rope_theta, "rope_type": "default"}
    text_config["tie_word_embeddings"] = False
    text_config["model_type"] = "qwen2"
    config = {
        "architectures": [type(model).__name__],
        "model_type": "audioflamingo3",
        "audio_config": audio_config,
        "text_config": text_config,
        "audio_token_id": model.config.audio_token_id,
    }
    if model.config.rotary_time_config is not None:
        rotary_time = asdict(model.config.rotary_time_config)
        config["architectures"] = ["MusicFlamingoForConditionalGeneration"]
        config["model_type"] = "musicflamingo"
        config["audio_frame_step"] = rotary_time.pop("audio_frame_step")
        config["rope_parameters"] = {"rope_type": "default", **rotary_time}
    return config


# ---- Checks ----


def check_is_plain(model: nn.Module) -> None:
    """Refuses a model whose tensors are not those of a checkpoint, for example one in int8."""
    with shapes_without_memory():
        plain = type(model)(model.config)
    others = set(model.state_dict()) ^ set(plain.state_dict())
    if others:
        raise ValueError(
            f"{min(others)}: a checkpoint's tensors are expected; "
            "save the model before it is quantized, and merge adapters."
        )


def check_can_save(directory: Path) -> None:
    check_name_is_utf_8(directory)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory}: not a directory; the name of a directory is expected.")
    if (directory / "llm").is_dir():
        raise ValueError(
            f"{directory}: a checkpoint in the original layout; choose another directory."
        )
