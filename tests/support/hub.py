"""Runs the `hf` program of an installed huggingface_hub without a network, in another process.

It need not be installed where the tests are: HUGGINGFACE_HUB_PACKAGES may be its folder.
"""

import json
import os
import re
import subprocess
import sys
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

from places import ROOT

SHARDS = [f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)]
TOKENIZER = ["tokenizer.json", "tokenizer_config.json", "merges.txt", "vocab.json"]
WEIGHTS = [*SHARDS, "model.safetensors.index.json"]
ADAPTER = ["adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.bin"]
NEEDED = [*TOKENIZER[:2], *WEIGHTS, "config.json", "generation_config.json"]
NEEDED += ["processor_config.json", "chat_template.jinja"]

# The files of each repository on the hub, as far as they matter here.
REPOSITORIES = {
    "nvidia/audio-flamingo-3-hf": [
        *("README.md", ".gitattributes", "model.safetensors", *NEEDED, *TOKENIZER[2:]),
        *(f"think/{name}" for name in ADAPTER),
    ],
    "nvidia/audio-flamingo-3": [
        *("README.md", ".gitattributes", "config.json"),
        *(f"llm/{name}" for name in [*TOKENIZER, *WEIGHTS, "config.json"]),
        *("sound_tower/config.json", "sound_tower/model.safetensors"),
        *("sound_mm_projector/config.json", "sound_mm_projector/model.safetensors"),
        *(f"stage35/{name}" for name in ADAPTER),
    ],
    "nvidia/AudioSkills": ["README.md", "AF3/train.json", "assets/a.wav", "assets/b.wav"],
}

# Reads [command, files of the repository] pairs, and prints what is selected of each.
SELECT = """
import contextlib
import io
import json
import socket
import sys

def no_network(*_):
    raise OSError("a test must not use the network")

socket.socket.connect = no_network
import huggingface_hub.cli.download as program
import huggingface_hub.cli.hf as hf
from huggingface_hub.utils import filter_repo_objects

hf.check_cli_update = hf.check_skill_update = lambda *_: None

def selected_by(words, files):
    chosen = []

    def download_patterns(allow_patterns=None, ignore_patterns=None, **_):
        patterns = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
        chosen.extend(filter_repo_objects(files, **patterns))
        return "folder"

    def download_one(filename, **_):
        chosen.extend(name for name in files if name == filename)
        return "file"

    program.snapshot_download = download_patterns
    program.hf_hub_download = download_one
    sys.argv = words
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        hf.main()
    return chosen

pairs = json.load(sys.stdin)
print(json.dumps([selected_by(words, files) for words, files in pairs]))
"""


def run_with_hub(code: str, text: str = "", **variables) -> str:
    """Runs code that may import huggingface_hub; returns what it prints."""
    packages = os.environ.get("HUGGINGFACE_HUB_PACKAGES") or os.environ.get("PYTHONPATH", "")
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": packages, **variables}
    command = [sys.executable, "-c", code]
    streams = {"input": text, "capture_output": True, "encoding": "utf-8"}
    result = subprocess.run(command, env=environment, **streams)
    assert result.returncode == 0, result.stderr
    return result.stdout


@cache
def hub_version() -> str:
    """The version of huggingface_hub; empty if it has no `hf`, or cannot be imported."""
    find = "import contextlib\nwith contextlib.suppress(ImportError):\n    "
    imports = "import huggingface_hub, huggingface_hub.cli.hf"
    return run_with_hub(f"{find}{imports}; print(huggingface_hub.__version__)").strip()


def select_files(commands: list[str]) -> list[set[str]]:
    """What each `hf download` command would download of its repository."""
    pairs = []
    for command in commands:
        words = re.findall(r'[^\s"]+|"[^"]*"', command)
        words = [word.strip('"') for word in words]
        pairs.append([words, files_of(words)])
    selected = run_with_hub(SELECT, json.dumps(pairs), HF_HUB_OFFLINE="1", HF_HOME=os.devnull)
    return [set(files) for files in json.loads(selected)]


def files_of(words: list[str]) -> list[str]:
    """The files of the repository of a command line; those of the official one if it is unknown."""
    assert words[:2] == ["hf", "download"]
    return REPOSITORIES.get(words[2], REPOSITORIES["nvidia/audio-flamingo-3-hf"])


def matching_files(command: str) -> set[str]:
    """The files that match any pattern or name on a command line, as its reader expects."""
    words = command.replace('"', "").split()
    files = files_of(words)
    return {name for name in files for word in words[3:] if fnmatch(name, word)}


def commands_in_texts() -> list[tuple[str, str]]:
    """(file, command) for each `hf` command in the texts and docstrings of the project."""
    commands = []
    for path in sorted(ROOT.rglob("*")):
        is_text = path.suffix in (".md", ".py", ".html", ".txt", ".toml")
        if is_text and is_ours(path.relative_to(ROOT)):
            text = path.read_text(encoding="utf-8").replace("\\\n", " ")
            for command in re.findall(
                r"^[ $#]*(hf [a-z].*?)\s*$|`(hf [a-z][^`]+ [^`]+)`", text, re.M
            ):
                commands.append((path.relative_to(ROOT).as_posix(), "".join(command)))
    return commands


def is_ours(path: Path) -> bool:
    is_hidden = any(part.startswith(".") for part in path.parts)
    return not is_hidden and path.parts[0] != "tests" and "site-packages" not in path.parts
