"""An adapter with factors computed by formulas, so that tests and goldens need no file."""

from pathlib import Path

import torch

from af3 import AudioFlamingo3ForConditionalGeneration
from extras.lora import DECODER_LINEARS, HEAD, LoraLinear, add_factors, choose_layers

TARGETS = (*DECODER_LINEARS, HEAD)


def with_factors(checkpoint: Path) -> AudioFlamingo3ForConditionalGeneration:
    """The model with unmerged factors of rank 2 and scale 3 in all layers."""
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(checkpoint, "cpu")
    for name in choose_layers(model, TARGETS, projector=True):
        add_factors(model, name, rank=2, alpha=6.0)
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLinear)]
    for number, layer in enumerate(layers):
        for factor in (layer.lora_A, layer.lora_B):
            values = torch.arange(factor.numel()) * 0.7 + number
            factor.data = 0.2 * torch.sin(values).view(factor.shape)
    return model
