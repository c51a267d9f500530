import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

TESTS = Path(__file__).resolve().parent
ROOT, TINY, SHARED = TESTS.parent, TESTS.parent / "tiny", TESTS.parent.parent / "shared"
sys.path[:0] = [str(ROOT), str(TESTS)]

import generate
from af3 import AudioFlamingo3ForConditionalGeneration
from processor import AudioFlamingo3Processor
from signals import sound, write_wav

TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "processor_config.json"]


@pytest.fixture(scope="session")
def micro(tmp_path_factory) -> Path:
    """A whole checkpoint directory: seeded random weights, tiny/'s tokenizer. Copy it before you change it."""
    folder = tmp_path_factory.mktemp("micro")
    for file in [*(TESTS / "micro").iterdir(), *(TINY / name for name in TOKENIZER_FILES)]:
        shutil.copy(file, folder)
    return folder


@pytest.fixture
def spoilt(micro, tmp_path) -> Path:
    """A copy of `micro` that a test may spoil."""
    return Path(shutil.copytree(micro, tmp_path / "checkpoint"))


@pytest.fixture(scope="session")
def model(micro):
    return AudioFlamingo3ForConditionalGeneration.from_pretrained(micro, device_map="cpu")


@pytest.fixture(scope="session")
def processor(micro):
    return AudioFlamingo3Processor.from_pretrained(micro)


@pytest.fixture(scope="session")
def goldens() -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in np.load(TESTS / "goldens.npz").items()}


@pytest.fixture(scope="session")
def qwen() -> Path:
    if not (SHARED / "qwen" / "tokenizer.json").exists():
        pytest.skip("the big model's tokenizer files (../shared/qwen) are not here")
    return SHARED / "qwen"


@pytest.fixture(scope="session")
def ffmpeg() -> str:
    return shutil.which("ffmpeg") or pytest.skip("ffmpeg is not installed")


@pytest.fixture
def clip(tmp_path):
    return str(write_wav(tmp_path / "clip.wav", sound(24000)))


@pytest.fixture
def run(monkeypatch, capsys, micro):
    """(exit status, stdout, stderr) of the command line in this process, with the micro checkpoint."""
    def call(*arguments, model=micro):
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, arguments), "--model", str(model), "--device", "cpu"])
        status = generate.main()
        return status, *capsys.readouterr()
    return call
