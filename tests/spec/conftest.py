"""Fixtures of the specification, and the order in which it is read.

Nothing here imports af3 or processor before a test needs them: `--implementation` chooses which.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

TINY = Path(__file__).resolve().parents[2] / "tiny"

# The journey of a sound.
ORDER = [
    "test_frame_counts.py",
    "test_log_mel.py",
    "test_tokenizer.py",
    "test_prompt.py",
    "test_batch.py",
    "test_encoder.py",
    "test_splice.py",
    "test_decoder.py",
    "test_sampling.py",
    "test_generation.py",
    "test_loss.py",
    "test_checkpoint.py",
    "test_siblings.py",
]

PROCESSOR_FILES = [
    *("tokenizer.json", "tokenizer_config.json"),
    *("processor_config.json", "chat_template.jinja"),
]


def pytest_configure(config):
    config.addinivalue_line("markers", "differs(reason): transformers does it otherwise")


def pytest_collection_modifyitems(config, items):
    """Puts the specification first and in order, and skips what transformers does otherwise."""
    here = Path(__file__).parent
    spec = [item for item in items if item.path.parent == here]
    others = [item for item in items if item.path.parent != here]
    spec.sort(key=lambda item: ORDER.index(item.path.name))
    items[:] = spec + others
    if config.getoption("implementation", None) == "transformers":
        for item in spec:
            for mark in item.iter_markers("differs"):
                item.add_marker(pytest.mark.skip(reason=mark.args[0]))


@pytest.fixture(scope="session")
def tiny_config():
    """tiny_config(): the configuration of a small model, to change and to build from."""
    from af3 import AudioFlamingo3Config, AudioFlamingo3EncoderConfig, Qwen2Config

    def make():
        audio_config = AudioFlamingo3EncoderConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
        )
        text_config = Qwen2Config(
            vocab_size=647,
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            intermediate_size=96,
            max_position_embeddings=4096,
        )
        return AudioFlamingo3Config(
            audio_config=audio_config, text_config=text_config, audio_token_id=644
        )

    return make


@pytest.fixture(scope="session")
def randomized():
    """randomized(module, seed=0): the module with random weights, in which no part is neutral."""

    @torch.no_grad()
    def randomize(module, seed=0):
        generator = torch.Generator().manual_seed(seed)
        for name, weight in sorted(module.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim > 1:
                is_embedding = "embed" in name
                weight.copy_(noise if is_embedding else noise * weight[0].numel() ** -0.5)
            elif name.endswith("bias"):
                weight.copy_(0.3 * noise)
            else:  # of a norm
                weight.copy_(1 + 0.3 * noise)
        return module.eval()

    return randomize


@pytest.fixture(scope="session")
def model(tiny_config, randomized):
    from af3 import AudioFlamingo3ForConditionalGeneration

    return randomized(AudioFlamingo3ForConditionalGeneration(tiny_config()))


@pytest.fixture(scope="session")
def processor():
    """With the tokenizer of tiny/: 647 ids, of which <|im_start|> is 619 and <sound> 644."""
    from processor import AudioFlamingo3Processor

    return AudioFlamingo3Processor.from_pretrained(TINY)


@pytest.fixture(scope="session")
def sound():
    """sound(num_samples, seed=0): a gliding tone with noise, float32 at 16 kHz."""

    def make(num_samples, seed=0):
        seconds = np.arange(num_samples) / 16000
        tone = np.sin(2 * np.pi * (300 + 200 * seconds) * seconds)
        noise = np.random.default_rng(seed).standard_normal(num_samples)
        return (0.3 * tone + 0.05 * noise).astype(np.float32)

    return make


@pytest.fixture
def checkpoint(model, tmp_path):
    """A directory with all files of a checkpoint, for one test, which may change them."""
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    for name in PROCESSOR_FILES:
        shutil.copy(TINY / name, folder)
    return folder


@pytest.fixture
def sharded_checkpoint(checkpoint, tmp_path):
    """The same with the tensors in two files and an index."""
    from checkpoints import write_sharded

    folder = Path(shutil.copytree(checkpoint, tmp_path / "sharded"))
    write_sharded(folder)
    return folder


@pytest.fixture
def original_checkpoint(checkpoint, tmp_path):
    """The same in the layout of nvidia/audio-flamingo-3, with its older names."""
    from checkpoints import write_original

    folder = tmp_path / "original"
    write_original(checkpoint, folder)
    return folder


@pytest.fixture(scope="session")
def music_checkpoint(model, tmp_path_factory):
    """A checkpoint of Music Flamingo: the same weights, and two ids more for the borders."""
    from checkpoints import write_music_flamingo

    own = tmp_path_factory.mktemp("own")
    model.save_pretrained(own)
    for name in PROCESSOR_FILES:
        shutil.copy(TINY / name, own)
    folder = tmp_path_factory.mktemp("family") / "music"
    write_music_flamingo(own, TINY / "chat_template.jinja", folder, "music")
    return folder


@pytest.fixture(scope="session")
def music_model(music_checkpoint):
    from af3 import MusicFlamingoForConditionalGeneration

    return MusicFlamingoForConditionalGeneration.from_pretrained(music_checkpoint, device_map="cpu")


@pytest.fixture(scope="session")
def music_processor(music_checkpoint):
    """<|sound_bos|> is 647 and <|sound_eos|> 648."""
    from processor import MusicFlamingoProcessor

    return MusicFlamingoProcessor.from_pretrained(music_checkpoint)
