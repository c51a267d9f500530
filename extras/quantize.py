"""int8 weights: the decoder's linear layers in half the bytes of bfloat16.

Decoding reads every weight for every token, so half the bytes are half the time where the model is
large. The encoder stays as it is: it reads its weights once for a whole window.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 1 << 21  # weights that are converted at a time: a few MB, which stay in the CPU's cache


class Int8Linear(nn.Module):
    """A linear layer whose weight (out, in) is int8, with one scale for each output row."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.register_buffer("weight", torch.empty_like(linear.weight, dtype=torch.int8))
        self.register_buffer("scale", torch.empty_like(linear.weight[:, 0]))
        self.bias = linear.bias
        self.chunk_rows = 1 + CHUNK // linear.in_features
        smallest = torch.finfo(self.scale.dtype).tiny  # the scale of a row of zeros
        for start in range(0, linear.out_features, self.chunk_rows):
            rows = slice(start, start + self.chunk_rows)
            weight = linear.weight[rows].float()
            scale = self.scale[rows]  # a view
            scale.copy_(weight.abs().amax(1) / 127).clamp_(min=smallest)
            self.weight[rows] = weight.div_(scale[:, None]).round_()

    def forward(self, x: Tensor) -> Tensor:
        if self.is_for_few_tokens(x):
            tokens = x.flatten(0, -2)
            y = torch.ops.aten._weight_int8pack_mm(tokens, self.weight, self.scale)
            y = y.unflatten(0, x.shape[:-1])
        else:
            chunks = self.weight.split(self.chunk_rows)
            y = torch.cat([F.linear(x, chunk.to(x.dtype)) for chunk in chunks], dim=-1)
            y = y * self.scale
        if self.bias is not None:
            y = y + self.bias
        return y

    def is_for_few_tokens(self, x: Tensor) -> bool:
        """Whether PyTorch's int8 operator is the faster way, and gives the right result.

        In torch 2.13 it gives wrong results for widths that are no multiple of 16.
        """
        num_tokens = x[..., 0].numel()
        return x.is_cpu and num_tokens <= 8 and x.shape[-1] % 16 == 0


def quantize(model: nn.Module) -> nn.Module:
    """Replaces the decoder's linear layers, `lm_head` too, by int8 ones; returns the model.

    One layer at a time, so that memory never holds both copies of more than one. Raises ValueError
    for a model in float16, in which the products would overflow.
    """
    if model.dtype == torch.float16:
        raise ValueError(
            "dtype is torch.float16, in which int8 products overflow; "
            "float32, bfloat16 or, without int8, float16 is expected."
        )
    for module in model.language_model.modules():
        for name, layer in module.named_children():
            if isinstance(layer, nn.Linear):
                setattr(module, name, Int8Linear(layer))
    return model
