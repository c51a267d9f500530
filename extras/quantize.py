"""The decoder's weights in int8 or int4: half the size of bfloat16, or less than a third.

    model = quantize(AudioFlamingo3ForConditionalGeneration.from_pretrained(path, "cpu"), bits=4)
    save_quantized(model, "smaller")
    model = load_quantized("smaller")

Decoding reads every weight for every token, so a large model is faster with smaller weights.
The encoder is not quantized: it reads its weights only once for a whole window.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from af3 import AudioFlamingo3Config, AudioFlamingo3ForConditionalGeneration
from extras.float32_matmul import chunk_rows, count_tokens, multiply_in_chunks
from extras.int4 import BLOCK, GROUP, Int4Linear, operator_block_rows
from plumbing.find_checkpoint import find_checkpoint
from plumbing.json_file import read_json
from plumbing.save_checkpoint import hub_config, write_checkpoint


class Int8Linear(nn.Module):
    """A linear layer whose weight (out, in) is int8, with one scale for each output row."""

    most_tokens = 8  # up to which PyTorch's int8 operator is faster

    def __init__(self, linear: nn.Linear):
        """Makes an empty layer with the size and the bias of `linear`; `fill` sets its weights."""
        super().__init__()
        self.register_buffer("weight", torch.empty_like(linear.weight, dtype=torch.int8))
        self.register_buffer("scale", torch.empty_like(linear.weight[:, 0]))
        self.bias = linear.bias
        self.in_features = linear.in_features
        self.chunk_rows = chunk_rows(linear.in_features)

    @torch.no_grad()
    def fill(self, weight: Tensor) -> None:
        smallest = torch.finfo(self.scale.dtype).tiny  # the scale of a row of zeros
        for start in range(0, len(weight), self.chunk_rows):
            rows = slice(start, start + self.chunk_rows)
            part = weight[rows].float()
            scale = self.scale[rows]  # a view
            scale.copy_(part.abs().amax(1) / 127).clamp_(min=smallest)
            self.weight[rows] = (part / scale[:, None]).round_()

    def forward(self, x: Tensor) -> Tensor:
        # In torch 2.13 the operator gives wrong results for widths that are not multiples of 16.
        if x.is_cpu and count_tokens(x) <= self.most_tokens and x.shape[-1] % 16 == 0:
            tokens = x.reshape(-1, x.shape[-1]).contiguous()
            y = torch.ops.aten._weight_int8pack_mm(tokens, self.weight, self.scale)
            y = y.view(*x.shape[:-1], -1)
        else:
            y = multiply_in_chunks(x, self.weight.split(self.chunk_rows)) * self.scale
        if self.bias is not None:
            y = y + self.bias
        return y


# ---- Whole models ----

LAYERS = {8: Int8Linear, 4: Int4Linear}  # by bits


def quantize(model: nn.Module, bits: int = 8) -> nn.Module:
    """Replaces the decoder's linear layers and `lm_head` by int8 or int4 ones; returns the model.

    Works on one attention or MLP at a time, so that only its weights are in memory twice. Raises
    ValueError for a model in float16, in which the products would overflow.
    """
    if bits not in LAYERS:
        raise ValueError(f"bits is {bits!r}; 8 or 4 is expected.")
    check_is_not_float16(model)
    replace_layers(model, LAYERS[bits], fill=True)
    pack_layers(model, operator_block_rows())
    return model


def replace_layers(model: nn.Module, layer_class: type, fill: bool) -> None:
    for module in model.language_model.modules():
        for name, linear in module.named_children():
            if isinstance(linear, nn.Linear):
                layer = layer_class(linear)
                if fill:
                    layer.fill(linear.weight)
                setattr(module, name, layer)


def pack_layers(model: nn.Module, block_rows: int) -> None:
    """Repacks int4 layers in blocks of block_rows rows, if necessary."""
    for layer in model.modules():
        if isinstance(layer, Int4Linear) and layer.block_rows() != block_rows:
            layer.repack(block_rows)


# ---- Saving and loading ----

METHOD = "audio-flamingo-3-from-scratch"  # a name that other programs reject


def save_quantized(model: nn.Module, path: str | Path) -> None:
    """Writes a directory for `load_quantized`, without the processor's files.

    Raises OSError, or ValueError for a model that is not quantized.
    """
    bits = {Int8Linear: 8, Int4Linear: 4}.get(type(model.language_model.lm_head))
    if bits is None:
        raise ValueError("The model is not quantized; save_pretrained saves it.")
    quantization = {"quant_method": METHOD, "bits": bits}
    if bits == 4:
        quantization["group_size"] = GROUP
    config = {**hub_config(model), "quantization_config": quantization}
    pack_layers(model, BLOCK)
    try:
        write_checkpoint(model, config, path)
    finally:
        pack_layers(model, operator_block_rows())


def load_quantized(
    path: str | Path,
    device_map: str | int | torch.device | dict | None = "auto",
    dtype: str | torch.dtype = "auto",
) -> AudioFlamingo3ForConditionalGeneration:
    """Loads a model that `save_quantized` has written; the arguments are those of from_pretrained.

    Raises FileNotFoundError or ValueError, as from_pretrained does.
    """
    layer_class = LAYERS[read_bits(path)]

    class QuantizedModel(AudioFlamingo3ForConditionalGeneration):
        def __init__(self, config: AudioFlamingo3Config):
            super().__init__(config)
            replace_layers(self, layer_class, fill=False)

        def save_pretrained(self, path) -> None:
            save_quantized(self, path)

    model = QuantizedModel.from_pretrained(path, device_map, dtype)
    check_is_not_float16(model)
    for layer in model.modules():
        if isinstance(layer, Int4Linear):
            layer.scales_and_zeros = layer.scales_and_zeros.bfloat16()  # whatever the model's dtype
    pack_layers(model, operator_block_rows())
    return model


def check_is_not_float16(model: nn.Module) -> None:
    if model.dtype == torch.float16:
        raise ValueError(
            "dtype is torch.float16, in which products of integers overflow; "
            "float32, bfloat16 or, without --int8 and --int4, float16 is expected."
        )


def read_bits(path: str | Path) -> int:
    """Bits per weight in a directory that `save_quantized` has written."""
    config_path = find_checkpoint(path) / "config.json"
    quantization = read_json(config_path).get("quantization_config")
    known = [{"quant_method": METHOD, "bits": 8}]
    known.append({"quant_method": METHOD, "bits": 4, "group_size": GROUP})
    if quantization not in known:
        raise ValueError(
            f"{config_path}: quantization_config is {quantization}; one that "
            "save_quantized or generate.py --save has written is expected."
        )
    return quantization["bits"]
