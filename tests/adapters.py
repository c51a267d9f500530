"""An adapter whose factors are formulas, so that tests and goldens need no file of it."""

from pathlib import Path

import torch

from af3 import AudioFlamingo3ForConditionalGeneration
from extras.finetune import DECODER_LINEARS, Settings, make_trainable

SETTINGS = Settings(rank=2, alpha=6.0, targets=(*DECODER_LINEARS, "lm_head"), projector=True)


def with_factors(checkpoint: Path) -> AudioFlamingo3ForConditionalGeneration:
    """The model with its factors still apart."""
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(checkpoint, "cpu")
    for number, parameter in enumerate(make_trainable(model, SETTINGS).values()):
        values = torch.arange(parameter.numel()) * 0.7 + number
        parameter.data = 0.2 * torch.sin(values).view(parameter.shape)
    return model
