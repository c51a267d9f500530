"""int4 weights: a linear layer with 4.5 bits per weight, less than a third of bfloat16's size.

A weight is (q - 8) * scale + zero, with q from 0 to 15; PyTorch's operator expects this form. So
zero is the weight for q = 8. Each group of 64 weights in a row shares scale and zero. A few tokens
are multiplied by PyTorch's operator. For more tokens the weights are dequantized first, a few rows
at a time.
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from extras.float32_matmul import chunk_rows, count_tokens, multiply_in_chunks, product_dtype

GROUP = 64  # weights of a row that share scale and zero: 4.5 bits per weight
BLOCK = 64  # rows that are packed together in a file


class Int4Linear(nn.Module):
    """A linear layer whose weight is int4.

    packed (blocks, in, rows of a block / 2): the lower four bits of a byte are q of a row in the
    first half of the block, the upper four bits q of the same row in the second half.
    scales_and_zeros (groups of a row, out, 2). Rows and columns are padded with zeros.
    """

    most_tokens = 32  # up to which PyTorch's int4 operator is faster

    def __init__(self, linear: nn.Linear):
        """Makes an empty layer with the size and the bias of `linear`; `fill` sets its weights."""
        super().__init__()
        device = linear.weight.device
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        num_rows = round_up(linear.out_features, BLOCK)
        width = round_up(linear.in_features, GROUP)
        packed = torch.empty(num_rows // BLOCK, width, BLOCK // 2, dtype=torch.uint8, device=device)
        scales = torch.empty(width // GROUP, num_rows, 2, dtype=torch.bfloat16, device=device)
        self.register_buffer("packed", packed)
        self.register_buffer("scales_and_zeros", scales)
        self.bias = linear.bias

    @torch.no_grad()
    def fill(self, weight: Tensor) -> None:
        width = self.packed.shape[1]
        step = round_up(chunk_rows(width), BLOCK)
        for start in range(0, len(weight), step):
            part = weight[start : start + step].float()
            num_rows = round_up(len(part), BLOCK)
            part = F.pad(part, (0, width - part.shape[1], 0, num_rows - len(part)))
            q, scale, zero = quantize_groups(part.unflatten(1, (-1, GROUP)))
            blocks = slice(start // BLOCK, (start + num_rows) // BLOCK)
            self.packed[blocks] = pack(q.flatten(1), BLOCK)
            factors = torch.cat([scale, zero], dim=-1).transpose(0, 1)  # (groups, rows, 2)
            self.scales_and_zeros[:, start : start + num_rows] = factors

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, self.packed.shape[1] - self.in_features))
        if x.is_cpu and has_operator() and count_tokens(x) <= self.most_tokens:
            y = self.multiply_few(x)
        else:
            y = multiply_in_chunks(x, self.chunks(product_dtype(x)))
        y = y[..., : self.out_features]
        if self.bias is not None:
            y = y + self.bias
        return y

    def multiply_few(self, x: Tensor) -> Tensor:
        """Uses PyTorch's int4 operator, which is fast only in bfloat16."""
        tokens = x.reshape(-1, x.shape[-1]).contiguous().bfloat16()
        packed = self.packed.view(self.scales_and_zeros.shape[1], -1)
        factors = self.scales_and_zeros
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(tokens, packed, GROUP, factors)
        return y.view(*x.shape[:-1], -1).to(x.dtype)

    def chunks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yields the weights (some of out, in), a few blocks at a time.

        All chunks share the same memory: with new memory for each, a product of 150 tokens would
        take 1.5 times as long.
        """
        width = self.packed.shape[1]
        num_rows = round_up(chunk_rows(width), 4 * BLOCK)
        memory = torch.empty(width * num_rows, dtype=dtype, device=self.packed.device)
        packed = self.packed.split(num_rows // self.block_rows())
        scales_and_zeros = self.scales_and_zeros.split(num_rows, dim=1)
        for blocks, factors in zip(packed, scales_and_zeros):
            yield dequantize(blocks, factors, memory)

    def block_rows(self) -> int:
        return self.packed.shape[2] * 2

    def repack(self, block_rows: int) -> None:
        self.packed = pack(unpack(self.packed), block_rows).contiguous()


def round_up(number: int, multiple: int) -> int:
    return (number + multiple - 1) // multiple * multiple


def quantize_groups(weights: Tensor, rounds: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Quantizes groups of float32 weights (..., GROUP): q (uint8, 0 to 15), scale, zero (..., 1).

    At first the 16 levels span the range from the smallest to the largest weight. Each round then
    rounds the weights to the levels, and fits the levels to the rounded weights by least squares.
    Every round reduces the squared error; three rounds reduce it by 10%.
    """
    low = weights.amin(-1, keepdim=True)
    scale = (weights.amax(-1, keepdim=True) - low) / 15
    for _ in range(rounds):
        q = round_to_steps(weights, scale, low)
        mean = q.mean(-1, keepdim=True)
        centered = q - mean
        variance = centered.square().mean(-1, keepdim=True)
        covariance = (centered * weights).mean(-1, keepdim=True)
        scale = covariance / variance.clamp(min=1e-6)  # zero if all weights are equal
        low = weights.mean(-1, keepdim=True) - scale * mean
    scale = scale.bfloat16()
    zero = (low + 8 * scale).bfloat16()
    q = round_to_steps(weights, scale.float(), zero.float() - 8 * scale)
    return q.to(torch.uint8), scale, zero


def round_to_steps(weights: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    return ((weights - low) / scale).round_().clamp_(0, 15)


def pack(q: Tensor, block_rows: int) -> Tensor:
    """Packs q (rows, in), 0 to 15, into the bytes of `Int4Linear`."""
    blocks = q.view(-1, 2, block_rows // 2, q.shape[1])
    first_half, second_half = blocks.unbind(1)
    return (first_half | second_half << 4).transpose(1, 2)


def unpack(packed: Tensor) -> Tensor:
    """Inverse of `pack`: q (rows, in)."""
    blocks = torch.cat([packed & 15, packed >> 4], dim=2)  # (blocks, in, rows of a block)
    return blocks.transpose(1, 2).flatten(0, 1)


def dequantize(packed: Tensor, scales_and_zeros: Tensor, memory: Tensor) -> Tensor:
    """Dequantizes some blocks into `memory`, in its dtype; returns the weights (rows, in)."""
    num_blocks, width, half = packed.shape
    num_rows = num_blocks * 2 * half
    packed = packed.transpose(0, 1).contiguous()  # (in, blocks, half)
    weights = memory[: width * num_rows]
    q = weights.view(width, num_blocks, 2, half)
    q[:, :, 0] = packed & 15
    q[:, :, 1] = packed >> 4

    scale, zero = scales_and_zeros[:, None].to(memory.dtype).unbind(-1)  # (groups, 1, rows)
    q = weights.view(-1, GROUP, num_rows)
    torch.addcmul(zero - 8 * scale, q, scale.contiguous(), out=q)
    return weights.view(width, num_rows).T


@lru_cache
def operator_packing() -> int | None:
    """Rows per block in the packing of PyTorch's int4 operator: 64 with AVX-512, 32 with AVX2.

    None if it packs in another way or does not exist; then `Int4Linear` does not use it.
    """
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):  # before torch 2.6
        return None
    q = torch.arange(128 * 2, device="cpu").view(128, 2) % 13
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 1)
    for block_rows in (64, 32):
        if torch.equal(pack(q.to(torch.uint8), block_rows).flatten(), packed.flatten()):
            return block_rows
    return None


def has_operator() -> bool:
    return operator_packing() is not None


def operator_block_rows() -> int:
    """Rows per block of layers in memory."""
    return operator_packing() or BLOCK
