"""Products in float32 for a CPU without bfloat16 arithmetic: a part of a weight at a time.

Many CPUs have no instructions for bfloat16 (AVX512-BF16, AMX). There PyTorch multiplies a matrix by
many tokens in bfloat16 more slowly than it converts both to float32 and multiplies them then. The
result, rounded to bfloat16 again, is as exact. Decoding, with a token or a few at a time, stays as
it is: it takes the time in which the weights are read, and bfloat16 is half of what float32 is.
"""

import time
from collections.abc import Callable, Iterable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 1 << 21  # weights that are converted at a time: a few MB, which stay in the CPU's cache
FEWEST_TOKENS = 32  # for which the conversion pays


class Float32ProductLinear(nn.Linear):
    """The same linear layer; many tokens are multiplied in float32."""

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)  # not nn.Linear's, which makes new weights
        self.__dict__.update(linear.__dict__)

    def forward(self, x: Tensor) -> Tensor:
        if not multiplies_in_float32(x) or count_tokens(x) < FEWEST_TOKENS:
            return super().forward(x)
        return multiply_in_chunks(x, self.weight.split(chunk_rows(self.in_features)), self.bias)


class Float32ProductConv1d(nn.Conv1d):
    """The same convolution, in float32; the encoder's two have small weights."""

    def __init__(self, conv: nn.Conv1d):
        nn.Module.__init__(self)
        self.__dict__.update(conv.__dict__)

    def forward(self, x: Tensor) -> Tensor:
        if not multiplies_in_float32(x):
            return super().forward(x)
        y = self._conv_forward(x.float(), self.weight.float(), self.bias.float())
        return y.to(x.dtype)


def use_float32_products(model: nn.Module) -> nn.Module:
    """Replaces linear layers and convolutions if the model is in bfloat16 on such a CPU.

    Returns the model. No weight is copied, and none gets another name.
    """
    if not multiplies_in_float32(next(model.parameters())):
        return model
    for module in list(model.modules()):
        for name, layer in module.named_children():
            if type(layer) is nn.Linear:
                setattr(module, name, Float32ProductLinear(layer))
            if type(layer) is nn.Conv1d:
                setattr(module, name, Float32ProductConv1d(layer))
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
    return torch.float32 if multiplies_in_float32(x) else x.dtype


def multiplies_in_float32(x: Tensor) -> bool:
    return x.is_cpu and x.dtype == torch.bfloat16 and is_bfloat16_slow()


@lru_cache
def is_bfloat16_slow() -> bool:
    """Whether a product of many tokens takes longer in bfloat16 than with a conversion.

    Measured, within a few milliseconds: what a CPU can do and what PyTorch makes of it are two
    things.
    """
    x = torch.ones(128, 1024, dtype=torch.bfloat16)
    weight = torch.ones(1024, 1024, dtype=torch.bfloat16)
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
