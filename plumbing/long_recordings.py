"""A long recording in parts, which bounds the memory of the encoder and of the decoder."""

from torch import Tensor

WINDOWS_PER_PART = 8

FIRST_PART = 4096  # tokens at the start of a prompt; they need no mask
LATER_PART = 1024  # tokens after those; they need a mask of T x all tokens so far


def split_windows(feature_attention_mask: Tensor) -> list[slice]:
    """Neighboring windows to encode together, as slices.

    feature_attention_mask: (W, mel frames). A part also ends where the length changes, in whole
    seconds: padded to 30 s, the last window of a 40 s recording would take three times as long.
    """
    seconds = (feature_attention_mask.sum(-1) // 100).tolist()
    parts = []
    start = 0
    for end in range(1, len(seconds) + 1):
        is_full = end - start == WINDOWS_PER_PART
        if end == len(seconds) or is_full or seconds[end] != seconds[start]:
            parts.append(slice(start, end))
            start = end
    return parts


def split_prompt(x: Tensor, attention_mask: Tensor, cache) -> list[tuple[Tensor, Tensor]]:
    """Embeddings (B, T, H) and their mask (B, T), in parts that the decoder reads in turn.

    Without a cache, which would connect the parts, there is only one.
    """
    if cache is None:
        return [(x, attention_mask)]
    first_part = FIRST_PART if cache.length == 0 else LATER_PART
    cuts = list(range(first_part, x.shape[1], LATER_PART))
    return list(zip(x.tensor_split(cuts, dim=1), attention_mask.tensor_split(cuts, dim=1)))
