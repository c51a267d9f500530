"""Matrix products in float32 for CPUs without bfloat16 arithmetic, one chunk of a weight at a time.

Many CPUs have no instructions for bfloat16 arithmetic (AVX512-BF16, AMX). On these, PyTorch
multiplies many tokens faster if it converts them and the weight to float32 first. The result,
rounded to bfloat16, is as accurate. With few tokens, as in decoding, most of the time goes into
reading the weights, and bfloat16 weights have half the bytes; so few tokens stay in bfloat16.
"""

import time
from collections.abc import Callable, Iterable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 1 << 21  # weights converted at a time: a few MB, which stay in the CPU's cache
FEWEST_TOKENS = 32  # from which the conversion pays off


class Float32MatmulLinear(nn.Linear):
    """A linear layer that multiplies many tokens in float32."""

    def forward(self, x: Tensor) -> Tensor:
        if not is_faster_in_float32(x) or count_tokens(x) < FEWEST_TOKENS:
            return super().forward(x)
        return multiply_in_chunks(x, self.weight.split(chunk_rows(self.in_features)), self.bias)


class Float32MatmulConv1d(nn.Conv1d):
    """A convolution in float32, converted as a whole. The encoder has two, both with a bias."""

    def forward(self, x: Tensor) -> Tensor:
        if not is_faster_in_float32(x):
            return super().forward(x)
        y = self._conv_forward(x.float(), self.weight.float(), self.bias.float())
        return y.to(x.dtype)


def use_float32_matmul(model: nn.Module) -> nn.Module:
    """Replaces `forward` of linear layers and convolutions if bfloat16 is slow on this CPU.

    Models in other dtypes do not change. Weights keep their names. Returns the model.
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
    """Multiplies x (..., in) by a weight in chunks (some of out, in): (..., out), in x's dtype."""
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
    """The dtype in which a product with many tokens x is fastest."""
    return torch.float32 if is_faster_in_float32(x) else x.dtype


def is_faster_in_float32(x: Tensor) -> bool:
    return x.is_cpu and x.dtype == torch.bfloat16 and is_bfloat16_slow()


@lru_cache
def is_bfloat16_slow() -> bool:
    """Whether a product with many tokens takes longer in bfloat16 than in float32 with conversion.

    Measured, in about 50 ms, because it depends on PyTorch as well as on the CPU. If both take
    about the same time, another run may decide differently, and so round differently.
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
