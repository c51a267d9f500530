"""Finds a checkpoint: a directory, or a model in the local cache of the hub."""

import os
import re
from pathlib import Path

# The hub repository holds the weights twice, as one file and as shards. These are the shards.
DOWNLOAD_FILES = '"*.json" "*.jinja" "model-*-of-*.safetensors"'
DOWNLOAD_COMMAND = f"hf download nvidia/audio-flamingo-3-hf --include {DOWNLOAD_FILES}"


def find_checkpoint(name: str | Path) -> Path:
    """The directory `name`, or the newest snapshot of hub model `name` in the local hub cache.

    Nothing is downloaded. Raises FileNotFoundError, with the command that downloads it.
    """
    if str(name) and Path(name).is_dir():
        check_is_checkpoint(Path(name))
        return Path(name)
    cache = hub_cache()
    model = cache / f"models--{str(name).replace('/', '--')}"
    main = model / "refs" / "main"  # contains the commit hash of the newest snapshot
    if main.is_file():
        snapshot = model / "snapshots" / main.read_text().strip()
        if snapshot.is_dir():
            return snapshot
    if not re.fullmatch(r"[\w-]+/[\w.-]+", str(name)):  # not a name on the hub
        raise FileNotFoundError(f"{str(name)!r}: no such directory; a checkpoint is expected.")
    raise FileNotFoundError(
        f"{name}: no such directory, and no such model in {cache}. "
        f"To download the official one: {DOWNLOAD_COMMAND}"
    )


def hub_cache() -> Path:
    """The folder where the `hf` program keeps models, as its documentation defines it."""
    if os.environ.get("HF_HUB_CACHE"):
        return Path(os.environ["HF_HUB_CACHE"])
    if os.environ.get("HF_HOME"):
        return Path(os.environ["HF_HOME"]) / "hub"
    return Path.home() / ".cache" / "huggingface" / "hub"


def check_is_checkpoint(folder: Path) -> None:
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise ValueError(
            f"{folder}: a LoRA adapter; give it as --adapter, with its base as --model."
        )
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder}: no config.json inside; a checkpoint is expected.")
