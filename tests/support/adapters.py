"""Adapters with factors computed by formulas, so that tests and goldens need no file."""

import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from af3 import AudioFlamingo3ForConditionalGeneration
from checkpoints import change_json, read_json
from extras.lora import (
    DECODER_LINEARS,
    HEAD,
    LoraLinear,
    add_factors,
    choose_layers,
    save_adapter,
)

TARGETS = (*DECODER_LINEARS, HEAD)


def with_factors(checkpoint: Path) -> AudioFlamingo3ForConditionalGeneration:
    """The model with unmerged factors of rank 2 and scale 3 in all layers."""
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(checkpoint, "cpu")
    for name in choose_layers(model, TARGETS, projector=True):
        add_factors(model, name, rank=2, alpha=6.0)
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLinear)]
    for number, layer in enumerate(layers):
        for factor in (layer.lora_A, layer.lora_B):
            values = torch.arange(factor.numel()) * 0.7 + number
            factor.data = 0.2 * torch.sin(values).view(factor.shape)
    return model


# ---- With other fields in adapter_config.json ----

# The first two patterns fit the same layers, of which the first counts.
ALPHAS = {"q_proj": 3, r"layers\.\d\.self_attn\..*": 20, "^model.*down_proj": 1, "proj": 50}

# With each, make_adapter_goldens.py recorded the logits of peft.
VARIATIONS = {
    "alpha_pattern": {"alpha_pattern": ALPHAS},
    "alpha_pattern_rslora": {"alpha_pattern": ALPHAS, "use_rslora": True},
    "rank_pattern": {"rank_pattern": {"mlp.down_proj": 1}},
    "layers_to_transform": {
        "target_modules": list(DECODER_LINEARS),
        "exclude_modules": ".*audio_tower.*",
        "layers_to_transform": [1],
    },
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "eva": {"init_lora_weights": "eva"},
    "mica": {"init_lora_weights": "mica"},
    "bias": {"bias": "lora_only"},
    "modules_to_save": {"modules_to_save": ["linear_1"]},
    "convolution": {},
    "embedding": {},
}

NAMES = "base_model.model.model."
PROJECTOR = f"{NAMES}multi_modal_projector.linear_1"
CONVOLUTION = f"{NAMES}audio_tower.conv2"
EMBEDDING = f"{NAMES}language_model.embed_tokens"


def waves(*shape: int) -> Tensor:
    return 0.2 * torch.sin(torch.arange(math.prod(shape)) * 0.7).view(shape)


# The tensors that some of them have besides the factors of linear layers.
MORE_TENSORS = {
    "bias": {f"{PROJECTOR}.base_layer.bias": waves(48)},
    "modules_to_save": {f"{PROJECTOR}.weight": waves(48, 32), f"{PROJECTOR}.bias": waves(48)},
    "convolution": {
        f"{CONVOLUTION}.lora_A.weight": waves(2, 32, 3),
        f"{CONVOLUTION}.lora_B.weight": waves(32, 2, 1),
    },
    "embedding": {
        f"{EMBEDDING}.lora_embedding_A": waves(2, 647),
        f"{EMBEDDING}.lora_embedding_B": waves(48, 2),
    },
}


MORE_TARGETS = {"convolution": ["conv2"], "embedding": ["embed_tokens"]}


def save_variation(checkpoint: Path, folder: Path, name: str) -> None:
    """Saves the adapter of `with_factors`, with what is different in one of the variations."""
    save_adapter(with_factors(checkpoint), folder)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for key in list(tensors):
        if name == "rank_pattern" and "down_proj" in key:
            tensors[key] = tensors[key][:1] if "lora_A" in key else tensors[key][:, :1].clone()
        if name == "layers_to_transform" and ".layers.1." not in key:
            del tensors[key]
        if name == "modules_to_save" and PROJECTOR in key:
            del tensors[key]
    save_file(tensors | MORE_TENSORS.get(name, {}), path)
    config_path = folder / "adapter_config.json"
    targets = [*read_json(config_path)["target_modules"], *MORE_TARGETS.get(name, [])]
    change_json(config_path, **{"target_modules": targets} | VARIATIONS[name])
