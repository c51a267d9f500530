"""Writes a checkpoint with random weights, of the official size or small, for timing.

    hf download nvidia/audio-flamingo-3-hf "*.json" "*.jinja" --local-dir WORDS
    python tools/random_checkpoint.py WORDS FULL           16.5 GB in bfloat16
    python tools/random_checkpoint.py WORDS SMALL --small  0.25 GB in float32
    python tools/random_checkpoint.py WORDS WIDE --layers 2   4 GB: as wide, but less deep

WORDS is a checkpoint directory in the hub layout. Only its configuration and tokenizer are used.
For an Audio Flamingo Next, download these files from nvidia/audio-flamingo-next-hf.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
from af3 import AudioFlamingo3Config, AudioFlamingo3ForConditionalGeneration
from checkpoints import change_json, change_section
from load_weights import read_config
from plumbing.devices import shapes_without_memory
from plumbing.json_file import from_known_keys
from plumbing.replace_file import give_usual_mode
from plumbing.save_checkpoint import INDEX, MAX_SHARD_BYTES, divide_into_shards, write_json
from plumbing.terminal import exit_with
from plumbing.tokenizer_files import read_token_ids

SMALL_AUDIO = {"hidden_size": 192, "intermediate_size": 768}
SMALL_TEXT = {"hidden_size": 192, "intermediate_size": 576, "num_key_value_heads": 2}
SMALL_BOTH = {"num_hidden_layers": 4, "num_attention_heads": 6}


def copy_words(source: Path, folder: Path, small: bool, layers: int | None = None) -> None:
    """Copies everything but the weights; `small` and `layers` reduce the sizes in config.json."""
    folder.mkdir(parents=True)
    for path in [*source.glob("*.json"), *source.glob("*.jinja")]:
        if path.name != INDEX:
            shutil.copyfile(path, folder / path.name)
    if small:
        change_section(folder / "config.json", "audio_config", **SMALL_AUDIO, **SMALL_BOTH)
        change_section(folder / "config.json", "text_config", **SMALL_TEXT, **SMALL_BOTH)
    if layers is not None:
        for section in ("audio_config", "text_config"):
            change_section(folder / "config.json", section, num_hidden_layers=layers)


def write_random_weights(folder: Path, dtype: torch.dtype, seed: int) -> None:
    """Writes one shard at a time, so that only one is in memory."""
    config = read_config(folder, read_token_ids(folder))
    with shapes_without_memory():
        model = AudioFlamingo3ForConditionalGeneration(
            from_known_keys(AudioFlamingo3Config, config)
        )
    shapes = model.to(dtype).state_dict()
    generator = torch.Generator().manual_seed(seed)
    shards = divide_into_shards(shapes, MAX_SHARD_BYTES)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard = {name: random_tensor(name, shapes[name], generator) for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
        give_usual_mode(folder / file)
        weight_map |= dict.fromkeys(names, file)
    write_json(folder / INDEX, {"metadata": {}, "weight_map": weight_map})


def random_tensor(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """Large enough that every layer affects the logits, small enough that they stay finite."""
    tensor = torch.empty(like.shape, dtype=like.dtype).normal_(generator=generator)
    if "norm" in name and name.endswith("weight"):
        return tensor.mul_(0.2).add_(1)
    if tensor.ndim == 1 or "positions" in name:
        return tensor.mul_(0.1)
    if "embed" in name:
        return tensor.mul_(0.5)
    return tensor.mul_(1.5 / tensor[0].numel() ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", type=Path, help="a directory with config.json and tokenizer")
    parser.add_argument("out", type=Path, help="a new directory")
    parser.add_argument("--small", action="store_true", help="4 + 4 layers of 192 channels")
    parser.add_argument("--layers", type=int, help="layers of encoder and decoder")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    dtype = torch.float32 if args.small else torch.bfloat16
    copy_words(args.words, args.out, args.small, args.layers)
    change_json(args.out / "config.json", dtype=str(dtype).removeprefix("torch."))
    write_random_weights(args.out, dtype, args.seed)


if __name__ == "__main__":
    exit_with(main)
