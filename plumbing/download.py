"""The cache of the hub on this computer, and the `hf` commands that fill it.

Nothing is downloaded here. If a file is missing or damaged, the error gives the command.
"""

import os
import re
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

# Patterns for `hf download`. Several are plain words, because in newer versions --include takes
# only one and the others cancel it. One alone needs --include: as a word it would be a file's name.
ALL_FILES = '"*.json" "*.jinja" "*.safetensors"'
ORIGINAL_FILES = 'config.json "llm/*" "sound_tower/*" "sound_mm_projector/*"'

OFFICIAL = "nvidia/audio-flamingo-3-hf"
FILES = {
    # The repository holds the weights twice, as one file and as shards. These are the shards.
    OFFICIAL: '"*.json" "*.jinja" "model-*-of-*.safetensors"',
    "nvidia/audio-flamingo-3": ORIGINAL_FILES,
    "nvidia/audio-flamingo-3-chat": ORIGINAL_FILES,
    "nvidia/music-flamingo-hf": ALL_FILES,
    "nvidia/music-flamingo-2601-hf": ALL_FILES,
    "nvidia/audio-flamingo-next-hf": ALL_FILES,
    "nvidia/audio-flamingo-next-think-hf": ALL_FILES,
    "nvidia/audio-flamingo-next-captioner-hf": ALL_FILES,
}
THINK_FOLDERS = {OFFICIAL: "think", "nvidia/audio-flamingo-3": "stage35"}
SUBFOLDERS = ("llm", "sound_tower", "sound_mm_projector", "think", "stage35")


def hub_cache() -> Path:
    """The folder where `hf` keeps models, from the same variables in the same order."""
    home = os.path.join(os.path.expanduser("~"), ".cache")
    home = os.path.join(os.environ.get("XDG_CACHE_HOME", home), "huggingface")
    home = expand(os.environ.get("HF_HOME", home))
    cache = os.environ.get("HUGGINGFACE_HUB_CACHE", os.path.join(home, "hub"))
    return Path(expand(os.environ.get("HF_HUB_CACHE", cache)))


def expand(path: str) -> str:
    return os.path.expandvars(os.path.expanduser(path))


def folder_in_cache(model: str) -> Path:
    return hub_cache() / f"models--{model.replace('/', '--')}"


def is_hub_name(name: str) -> bool:
    return re.fullmatch(r"[\w-]+/[\w.-]+", name) is not None


def download_command(model: str) -> str:
    return f"hf download {model} {FILES.get(model, ALL_FILES)}"


def similar_model(name: str) -> str | None:
    """The supported model with the most similar name, if one is similar enough."""
    models = {model.split("/")[1]: model for model in FILES}
    matches = get_close_matches(name.lower().split("/")[-1], models, n=1, cutoff=0.8)
    return models[matches[0]] if matches else None


# ---- Files that are missing or damaged ----


class Download(NamedTuple):
    """What a directory was downloaded from, and how `hf` writes to it again."""

    model: str
    folder: Path
    options: str


def find_download(path: Path) -> Download | None:
    """What a checkpoint's file was downloaded from by `hf`, if it was. The file may be absent."""
    folder = Path(os.path.realpath(path.parent))
    folders = [folder]
    if folder.name in SUBFOLDERS:
        folders.append(folder.parent)
    for folder in folders:
        if folder.parent.name == "snapshots":
            return find_snapshot(folder)
        if (folder / ".cache" / "huggingface" / "download").is_dir():  # by --local-dir
            names = [model for model in FILES if model.split("/")[1] == folder.name]
            return Download([*names, "MODEL"][0], folder, f' --local-dir "{folder}"')
    return None


def find_snapshot(folder: Path) -> Download | None:
    """The same for a folder in the `snapshots` of a cache."""
    in_cache = folder.parent.parent
    model = in_cache.name.removeprefix("models--").replace("--", "/")
    if not in_cache.name.startswith("models--") or not is_hub_name(model):
        return None
    options = ""
    if read_reference(in_cache) != folder.name:
        options += f" --revision {folder.name}"
    if in_cache.parent != Path(os.path.realpath(hub_cache())):
        options += f' --cache-dir "{in_cache.parent}"'
    return Download(model, folder, options)


def read_reference(in_cache: Path) -> str:
    """The name of the newest snapshot of a model in a cache; empty if the cache does not say."""
    reference = in_cache / "refs" / "main"
    if not reference.is_file():
        return ""
    return reference.read_text(encoding="utf-8", errors="replace").strip()


def how_to_complete(path: Path) -> str:
    """The end of an error about a missing file; empty if no command is known to help."""
    download = find_download(path)
    if download is None:
        return ""
    model, folder, options = download
    files = FILES.get(model, ALL_FILES)
    is_think = path.parent.name in THINK_FOLDERS.values()
    if is_think and Path(os.path.realpath(path.parent)) != folder:
        if model not in THINK_FOLDERS:
            return ""
        files = f'--include "{THINK_FOLDERS[model]}/*"'
    return f" To complete it{explain(model)}: hf download {model} {files}{options}"


def how_to_replace(path: Path) -> str:
    """The end of an error about a damaged file. `hf` does not replace one unless it is forced."""
    with open(path, "rb") as file:
        if file.read(30).startswith(b"version https://git-lfs"):
            return f' It is a placeholder of Git LFS. To get it: git -C "{path.parent}" lfs pull'
    download = find_download(path)
    if download is None:
        return " Save or copy it again."
    model, folder, options = download
    file = Path(os.path.realpath(path.parent), path.name).relative_to(folder).as_posix()
    command = f"hf download {model} {file} --force-download{options}"
    return f" To download it again{explain(model)}: {command}"


def explain(model: str) -> str:
    return ", with its name on the hub for MODEL" if model == "MODEL" else ""
