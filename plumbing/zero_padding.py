"""The log-mel of a short clip without computing 30 s of it."""

from collections.abc import Callable
from functools import wraps

import torch.nn.functional as F
from torch import Tensor


def zero_padded(num_samples: int, hop_length: int) -> Callable:
    """A decorator for a spectrogram: it gets its samples (n,) padded with zeros to num_samples.

    A frame sees 200 samples to either side of its center, which is more than one hop of 160. So
    the first two frames after the clip still see some of it. The third and all later ones see only
    zeros, and are the same: the third is computed, and repeated. That makes a clip of 5 s five
    times as fast.
    """

    def decorate(spectrogram: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        @wraps(spectrogram)
        def padded_spectrogram(samples: Tensor) -> Tensor:
            num_frames = -(len(samples) // -hop_length) + 3
            length = min(num_frames * hop_length, num_samples)
            frames = spectrogram(F.pad(samples, (0, length - len(samples))))
            missing = num_samples // hop_length - frames.shape[1]
            return F.pad(frames, (0, missing), mode="replicate")

        return padded_spectrogram

    return decorate
