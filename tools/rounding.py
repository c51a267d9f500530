"""Measures how much int4's search for scales improves on plain rounding to each group's range.

    python tools/rounding.py tiny RECORDINGS

Prints the relative errors (norm of the difference over norm) of the decoder's weights, and of the
logits for the WAV files in a folder.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from af3 import AudioFlamingo3ForConditionalGeneration
from extras import int4
from extras.quantize import quantize
from plumbing.terminal import exit_with
from processor import AudioFlamingo3Processor

PROMPTS = ["Describe the audio.", "Transcribe the input speech.", "What sound is this?"]

load = AudioFlamingo3ForConditionalGeneration.from_pretrained
quantize_groups = int4.quantize_groups


def quantized(path: str, rounds: int) -> nn.Module:
    with mock.patch.object(int4, "quantize_groups", partial(quantize_groups, rounds=rounds)):
        return quantize(load(path, "cpu"), bits=4)


def weights_error(model: nn.Module, rounds: int) -> float:
    error = 0.0
    total = 0.0
    for layer in model.language_model.modules():
        if isinstance(layer, nn.Linear):
            usable = layer.in_features // int4.GROUP * int4.GROUP
            groups = layer.weight[:, :usable].float().unflatten(1, (-1, int4.GROUP))
            q, scale, zero = quantize_groups(groups, rounds)
            error += float(((q.float() - 8) * scale + zero - groups).square().sum())
            total += float(groups.square().sum())
    return (error / total) ** 0.5


@torch.inference_mode()
def logits_error(model: nn.Module, other: nn.Module, batches: list) -> float:
    error = 0.0
    total = 0.0
    for batch in batches:
        expected = model(**batch).logits
        error += float((other(**batch).logits - expected).square().sum())
        total += float(expected.square().sum())
    return (error / total) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recordings", type=int, default=60)
    args = parser.parse_args()
    files = sorted(args.folder.rglob("*.wav"))
    files = files[:: max(1, len(files) // args.recordings)]
    if not files:
        raise FileNotFoundError(f"{args.folder}: no WAV files inside.")
    processor = AudioFlamingo3Processor.from_pretrained(args.model)
    batches = [processor(PROMPTS[n % 3], file) for n, file in enumerate(files)]
    model = load(args.model, "cpu")
    print(f"| {args.model}, {len(files)} recordings | weights | logits |\n|---|---|---|")
    for name, rounds in {"plain rounding": 0, "with the search": 3}.items():
        logits = logits_error(model, quantized(args.model, rounds), batches)
        print(f"| {name} | {weights_error(model, rounds):.1%} | {logits:.1%} |", flush=True)


if __name__ == "__main__":
    exit_with(main)
