"""A long prompt in parts, which limits the memory of the decoder.

Where no fused attention exists, for example in float32 on a GPU, all scores of a part are in memory
at once: of 4096 tokens and 28 heads, 1.9 GB. Of ten minutes in one part, it would be 26 GB.
"""

from torch import Tensor

FIRST_PART = 4096  # tokens at the start of a prompt; they need no mask
LATER_PART = 1024  # tokens after those; they need a mask of T x all tokens so far


def split_prompt(x: Tensor, attention_mask: Tensor, cache) -> list[tuple[Tensor, Tensor]]:
    """Embeddings x (B, T, H) and their mask (B, T), in parts for the decoder.

    Without a cache, which would connect the parts, there is only one.
    """
    if cache is None:
        return [(x, attention_mask)]
    first_part = LATER_PART
    if cache.length == 0:
        first_part = FIRST_PART
    cuts = list(range(first_part, x.shape[1], LATER_PART))
    return list(zip(x.tensor_split(cuts, dim=1), attention_mask.tensor_split(cuts, dim=1)))
