"""Finds a checkpoint: a directory, or a model in the local cache of the hub."""

import os
from pathlib import Path

from plumbing.download import (
    OFFICIAL,
    download_command,
    folder_in_cache,
    how_to_complete,
    hub_cache,
    is_hub_name,
    read_reference,
    similar_model,
)


def find_checkpoint(name: str | Path, or_file: str = "config.json") -> Path:
    """The directory `name`, or the newest snapshot of hub model `name` in the local hub cache.

    or_file: what a directory may have in the place of config.json; a processor needs none.
    Nothing is downloaded. Raises FileNotFoundError, with the command that downloads it, and
    ValueError for an adapter.
    """
    folder = find_folder(name)
    if not str(name) or not folder.is_dir():
        folder = find_in_cache(str(name))
    check_is_checkpoint(folder, or_file)
    return folder


def find_folder(name: str | Path) -> Path:
    """The path `name`; if it does not exist, with ~ replaced by the home directory."""
    path = Path(name)
    return path if path.exists() else Path(os.path.expanduser(path))


def find_in_cache(name: str) -> Path:
    """The newest snapshot of a hub model. Raises FileNotFoundError with one sentence that helps."""
    if not is_hub_name(name):
        similar = similar_model(name)
        hint = f" Perhaps {similar} is meant." if similar else ""
        raise FileNotFoundError(f"{name!r}: no such directory; a checkpoint is expected.{hint}")
    in_cache = folder_in_cache(name)
    reference = read_reference(in_cache)
    snapshot = in_cache / "snapshots" / reference
    if reference and snapshot.is_dir():
        return snapshot
    if in_cache.is_dir():
        refuse_without_reference(name, in_cache)
    raise FileNotFoundError(
        f"{name}: no such directory, and no such model in {hub_cache()}. {what_to_get(name)}"
    )


def refuse_without_reference(name: str, in_cache: Path) -> None:
    """Refuses a model in the cache whose newest snapshot is unknown or absent."""
    folders = [path for path in in_cache.glob("snapshots/*") if path.is_dir()]
    if not folders:
        raise FileNotFoundError(
            f"{name}: its download to {in_cache} is not complete. "
            f"To complete it: {download_command(name)}"
        )
    newest = max(folders, key=lambda folder: folder.stat().st_mtime)
    raise FileNotFoundError(
        f"{name}: {in_cache / 'refs' / 'main'} refers to none of the snapshots there; instead of "
        f"the name, use the path of one: {newest}"
    )


def what_to_get(name: str) -> str:
    """A sentence about a model that is not in the cache."""
    similar = similar_model(name)
    if similar is None:
        return f"To download the official one: {download_command(OFFICIAL)}"
    if similar == name:
        return f"To download it: {download_command(name)}"
    if folder_in_cache(similar).is_dir():
        return f"Perhaps {similar} is meant, which is there."
    return f"Perhaps {similar} is meant. To download that: {download_command(similar)}"


def check_is_checkpoint(folder: Path, or_file: str = "config.json") -> None:
    if (folder / "config.json").exists() or (folder / or_file).exists():
        return
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder}: a LoRA adapter; give it as --adapter, with its base as --model."
        )
    if folder.name.startswith("models--"):
        raise FileNotFoundError(
            f"{folder}: a folder of the hub's cache; use the model's name, or the path of one of "
            "the folders in its snapshots."
        )
    remedy = how_to_complete(folder / "config.json")
    if remedy:
        raise FileNotFoundError(
            f"{folder}: no config.json inside; the checkpoint is not complete.{remedy}"
        )
    raise FileNotFoundError(f"{folder}: no config.json inside; a checkpoint is expected.")
