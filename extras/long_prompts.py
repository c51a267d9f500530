"""Faster attention for the later parts of a long prompt on a CPU.

    use_unmasked_attention(model)

A part of a prompt that follows other tokens needs a mask, and PyTorch's attention with a mask
takes up to twice as long as without one. Only the T tokens of the part itself need to be masked:
they see all earlier tokens. So attention to the earlier tokens and attention within the part are
computed apart, both without a mask, and added with the weights that a common softmax would give.
"""

from functools import lru_cache

import torch
from torch import Tensor, nn

from af3 import Qwen2Attention


class UnmaskedAttention(Qwen2Attention):
    """The decoder's attention, with another way to compute the later parts of a prompt."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        is_later_part = mask is not None and q.shape[2] > 1
        # The last token sees everything if there is no padding.
        if is_later_part and q.is_cpu and bool(mask[:, :, -1].all()) and is_possible():
            return attend_to_past_and_part(q, k, v)
        return super().attend(q, k, v, mask)


def use_unmasked_attention(model: nn.Module) -> nn.Module:
    """Changes the decoder's attention, whose weights stay the same. Returns the model."""
    for layer in model.language_model.model.layers:
        layer.self_attn.__class__ = UnmaskedAttention
    return model


def attend_to_past_and_part(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of the last T of all tokens: (B, query heads, T, D).

    q: (B, query heads, T, D); k and v: (B, key-value heads, all tokens, D), all real.
    """
    # It also returns log-sum-exp of the scores, (B, heads, T), which F.scaled_dot_product_attention
    # does not.
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    tokens = q.shape[2]
    key_value_heads = k.shape[1]
    # Every query sees the whole past, so the queries that share a head can be in one sequence.
    grouped = q.reshape(len(q), key_value_heads, -1, q.shape[3])
    past, past_scores = attention(grouped, k[:, :, :-tokens], v[:, :, :-tokens])

    sharing = q.shape[1] // key_value_heads
    part_k = k[:, :, -tokens:].repeat_interleave(sharing, dim=1)
    part_v = v[:, :, -tokens:].repeat_interleave(sharing, dim=1)
    part, part_scores = attention(q, part_k, part_v, is_causal=True)

    weight = torch.sigmoid(past_scores.reshape(part_scores.shape) - part_scores)[..., None]
    return torch.lerp(part.float(), past.reshape(part.shape).float(), weight).to(q.dtype)


@lru_cache
def is_possible() -> bool:
    """Whether PyTorch's operator, which is private and may change, gives what is expected."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 3, 8, generator=generator)
    k, v = torch.randn(2, 1, 2, 5, 8, generator=generator)
    positions = torch.arange(5)
    mask = positions <= positions[-3:, None]
    try:
        result = attend_to_past_and_part(q, k, v)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False
    k, v = [x.repeat_interleave(2, dim=1) for x in (k, v)]
    expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return torch.allclose(result, expected, atol=1e-5)
