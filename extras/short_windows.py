"""A faster encoder for windows of different lengths.

    encode_short_windows_apart(model)

The model encodes up to eight windows together, and pads all to the longest. So the last 10 s of a
recording of 40 s would take as long as 30 s. Here, neighboring windows are encoded together only
if they are equally long, in whole seconds.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from af3 import AudioFlamingo3Encoder


class DividingEncoder(AudioFlamingo3Encoder):
    """The encoder, which divides the windows by their length."""

    def forward(self, input_features: Tensor, feature_attention_mask: Tensor) -> Tensor:
        seconds = feature_attention_mask.sum(-1) // 100
        counts = seconds.unique_consecutive(return_counts=True)[1].tolist()
        encoded = []
        windows = zip(input_features.split(counts), feature_attention_mask.split(counts))
        for features, mask in windows:
            encoded.append(super().forward(features, mask))
        longest = max(frames.shape[1] for frames in encoded)
        # The model drops what is added to the shorter windows here.
        padded = [F.pad(frames, (0, 0, 0, longest - frames.shape[1])) for frames in encoded]
        return torch.cat(padded)


def encode_short_windows_apart(model: nn.Module) -> nn.Module:
    """Changes the model's encoder, whose weights stay the same. Returns the model."""
    model.audio_tower.__class__ = DividingEncoder
    return model
