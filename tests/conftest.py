"""Fixtures. The tests use one thread: on a busy machine, several wait for each other."""

import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; inherited by subprocesses

import numpy as np
import pytest
import torch

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
sys.path[:0] = [str(ROOT), str(TESTS / "support"), str(ROOT / "tools")]

from checkpoints import write_music_flamingo
from places import DATA, SHARED, TINY
from signals import sound, write_wav

TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "processor_config.json"]


def pytest_addoption(parser):
    parser.addoption(
        "--implementation",
        metavar="DIR",
        help="for tests/spec: take af3.py and processor.py from DIR; "
        "transformers: from the library, through tests/support/transformers_implementation/",
    )


def pytest_configure(config):
    folder = config.getoption("implementation")
    if folder is None:
        return
    if folder == "transformers":
        folder = TESTS / "support" / "transformers_implementation"
    if not (Path(folder) / "af3.py").exists():
        raise pytest.UsageError(f"--implementation {folder}: no af3.py inside.")
    # Before anything imports af3 or processor: fixtures import them, this file does not.
    sys.path.insert(0, str(Path(folder).resolve()))


@pytest.fixture(scope="session")
def micro(tmp_path_factory) -> Path:
    """A complete checkpoint with seeded random weights and tiny/'s tokenizer. Do not modify it."""
    folder = tmp_path_factory.mktemp("micro")
    for file in (DATA / "micro").iterdir():
        shutil.copy(file, folder)
    for name in TOKENIZER_FILES:
        shutil.copy(TINY / name, folder)
    return folder


@pytest.fixture(scope="session")
def families(micro, tmp_path_factory) -> dict[str, Path]:
    """The same for Audio Flamingo 3 and its siblings. Do not modify them."""
    folders = {"af3": micro}
    for family in ("music", "next"):
        folders[family] = tmp_path_factory.mktemp("family") / family
        write_music_flamingo(micro, TINY / "chat_template.jinja", folders[family], family)
    return folders


@pytest.fixture(scope="session", params=["music", "next"])
def music_flamingo(request, families) -> Path:
    """That of Music Flamingo, and that of Audio Flamingo Next. Do not modify it."""
    return families[request.param]


@pytest.fixture
def spoiled(micro, tmp_path) -> Path:
    """A copy of `micro` that a test may modify."""
    return Path(shutil.copytree(micro, tmp_path / "checkpoint"))


@pytest.fixture(scope="session")
def model(micro):
    from af3 import AudioFlamingo3ForConditionalGeneration

    return AudioFlamingo3ForConditionalGeneration.from_pretrained(micro, device_map="cpu")


@pytest.fixture(scope="session")
def processor(micro):
    from processor import AudioFlamingo3Processor

    return AudioFlamingo3Processor.from_pretrained(micro)


@pytest.fixture(scope="session")
def goldens() -> dict[str, torch.Tensor]:
    """The outputs of transformers and peft, recorded by make_goldens.py."""
    arrays = np.load(DATA / "goldens.npz")
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


@pytest.fixture(scope="session")
def official_tokenizer():
    from processor import Tokenizer

    if not (SHARED / "qwen" / "tokenizer.json").exists():
        pytest.skip("the official tokenizer files (../shared/qwen) are not here")
    return Tokenizer(SHARED / "qwen")


@pytest.fixture(scope="session")
def ffmpeg() -> str:
    return shutil.which("ffmpeg") or pytest.skip("ffmpeg is not installed")


@pytest.fixture
def clip(tmp_path) -> str:
    """The path of a recording of 1.5 s."""
    return str(write_wav(tmp_path / "clip.wav", sound(24000)))


@pytest.fixture
def odd_clip(clip) -> str:
    """The same recording, with a name that is not UTF-8."""
    path = os.path.join(os.path.dirname(clip), os.fsdecode(b"caf\xe9.wav"))
    try:
        return shutil.copy(clip, path)
    except OSError:
        pytest.skip("this file system has only UTF-8 names")


@pytest.fixture
def run(monkeypatch, capsys, micro):
    """Runs the command line in this process; returns (exit status, stdout, stderr)."""
    import generate

    def call(*arguments, model=micro):
        command = ["generate.py", "--model", model, "--device", "cpu", *arguments]
        monkeypatch.setattr(sys, "argv", [str(word) for word in command])
        status = generate.main()
        return status, *capsys.readouterr()

    return call
