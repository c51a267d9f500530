"""Products in float32 for a CPU without bfloat16 arithmetic: a part of a weight at a time.

Many CPUs have no instructions for bfloat16 (AVX512-BF16, AMX). There PyTorch takes less time to
convert many tokens and the weight to float32, and to multiply those, than to multiply them in
bfloat16. The result, rounded to bfloat16, is as exact. When few tokens are multiplied, as in
decoding, the time goes into reading the weights, and bfloat16 has half the bytes; so nothing
changes there.
"""

import time
from collections.abc import Callable, Iterable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 1 << 21  # weights that are converted at a time: a few MB, which stay in the CPU's cache
FEWEST_TOKENS = 32  # for which the conversion pays


class Float32MatmulLinear(nn.Linear):
    """A linear layer that multiplies many tokens in float32."""

    def forward(self, x: Tensor) -> Tensor:
        if not is_faster_in_float32(x) or count_tokens(x) < FEWEST_TOKENS:
            return super().forward(x)
        return multiply_in_chunks(x, self.weight.split(chunk_rows(self.in_features)), self.bias)


class Float32MatmulConv1d(nn.Conv1d):
    """A convolution in float32. The encoder's two, which have a bias, are converted whole."""

    def forward(self, x: Tensor) -> Tensor:
        if not is_faster_in_float32(x):
            return super().forward(x)
        y = self._conv_forward(x.float(), self.weight.float(), self.bias.float())
        return y.to(x.dtype)


def use_float32_matmul(model: nn.Module) -> nn.Module:
    """Changes linear layers and convolutions if the model is in bfloat16 on such a CPU.

    Returns the model. A layer keeps its weights under their names, and gets another `forward`.
    """
    if not is_faster_in_float32(next(model.parameters())):
        return model
    for layer in model.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = Float32MatmulLinear
        elif type(layer) is nn.Conv1d:
            layer.__class__ = Float32MatmulConv1d
    return model


def multiply_in_chunks(x: Tensor, chunks: Iterable[Tensor], bias: Tensor | None = None) -> Tensor:
    """x (..., in) times the chunks (some of out, in) of a weight: (..., out), in the dtype of x."""
    dtype = product_dtype(x)
    factor = x.to(dtype)
    products = []
    done = 0
    for chunk in chunks:
        product = F.linear(factor, chunk.to(dtype))
        if bias is not None:
            product += bias[done : done + len(chunk)]
        products.append(product.to(x.dtype))
        done += len(chunk)
    return torch.cat(products, dim=-1)


def chunk_rows(in_features: int) -> int:
    return 1 + CHUNK // in_features


def count_tokens(x: Tensor) -> int:
    return x[..., 0].numel()


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which many tokens x are multiplied fastest."""
    return torch.float32 if is_faster_in_float32(x) else x.dtype


def is_faster_in_float32(x: Tensor) -> bool:
    return x.is_cpu and x.dtype == torch.bfloat16 and is_bfloat16_slow()


@lru_cache
def is_bfloat16_slow() -> bool:
    """Whether a product of many tokens takes longer in bfloat16 than with a conversion.

    Measured, in about 50 ms: what a CPU can do and what PyTorch makes of it are two things. Where
    both take about as long, another run may choose the other way, and round differently.
    """
    x = torch.ones(128, 1024, dtype=torch.bfloat16, device="cpu")
    weight = torch.ones(1024, 1024, dtype=torch.bfloat16, device="cpu")
    in_bfloat16 = []
    in_float32 = []
    for _ in range(5):
        in_bfloat16.append(seconds(lambda: F.linear(x, weight)))
        in_float32.append(seconds(lambda: F.linear(x.float(), weight.float())))
    return min(in_float32) < min(in_bfloat16)


def seconds(function: Callable) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
