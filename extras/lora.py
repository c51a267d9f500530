"""LoRA adapters (Hu et al. 2021), merged into a loaded model: AF-Think, or one of finetune.py.

An adapter adds to a weight W (out, in) the product of two thin matrices, which were trained
instead of W: W + scale * B @ A, with A (rank, in) and B (out, rank).
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from load_weights import (
    check_is_file,
    check_is_there,
    errors_naming,
    find_checkpoint,
    model_name,
    read_json,
)

OTHERS = "non_lora_trainables.bin"  # what was trained as a whole, beside the factors


def find_think_adapter(path: str | Path) -> Path:
    """The directory of AF-Think's adapter in a checkpoint: think/, or stage35/ in the original."""
    folder = find_checkpoint(path)
    original = folder / "stage35"
    think = original if original.is_dir() else folder / "think"
    if not think.is_dir():
        raise FileNotFoundError(
            f"{think}: no such directory; the AF-Think adapter is expected there, or in stage35/."
        )
    check_is_there(think / OTHERS)  # it has weights that are not LoRA
    return think


def merge_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Merges the adapter in a directory, as `peft` saves it, into the model's weights.

    The sum is in float32 and rounded once, to the weight's dtype. What was trained beside the
    adapter (in non_lora_trainables.bin, if it is there) replaces the model's own. Returns the
    model. Raises FileNotFoundError or ValueError; a tensor that has no place in the model is
    named.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such directory; an adapter is expected.")
    config_path = folder / "adapter_config.json"
    config = read_json(config_path)
    check_adapter_config(config, config_path)
    tensors = read_adapter(folder)
    weights = model.state_dict()
    with errors_naming(folder):
        names = {merged_name(name): name for name in tensors}  # the model's name -> the adapter's
        tensors = {merged_name(name): tensor for name, tensor in tensors.items()}
        for name, weight in weights.items():
            layer = name.removesuffix("weight")
            if f"{layer}lora_A.weight" in tensors and f"{layer}lora_B.weight" in tensors:
                a = tensors.pop(f"{layer}lora_A.weight").float()  # (rank, in)
                b = tensors.pop(f"{layer}lora_B.weight").float()  # (out, rank)
                scale = lora_scale(config, rank=len(a))
                whole = tensors.get(name, weight).float()
                tensors[name] = torch.addmm(whole, b, a, alpha=scale).to(weight.dtype)
        for name in tensors:
            if name in weights:
                tensors[name] = tensors[name].to(weights[name])
        result = model.load_state_dict(tensors, strict=False, assign=True)
    unplaced = [names[name] for name in result.unexpected_keys]
    if unplaced:
        raise ValueError(f"{folder}: no place in the model for {', '.join(unplaced)}.")
    return model.requires_grad_(False)


def merged_name(name: str) -> str:
    """The model's name for a tensor of an adapter, in which a layer with factors may be whole."""
    return model_name(name).replace(".base_layer.", ".")


def lora_scale(config: dict, rank: int) -> float:
    """lora_alpha / rank, or lora_alpha / sqrt(rank) for a rank-stabilised adapter."""
    if config.get("use_rslora"):
        return config["lora_alpha"] / rank**0.5
    return config["lora_alpha"] / rank


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's one or two files, under their own names."""
    tensors = {}
    path = folder / OTHERS
    check_is_file(path)
    if path.exists():
        with errors_naming(path):
            # A pickle, which can run code when it is read. weights_only refuses all but tensors.
            tensors = dict(torch.load(path, map_location="cpu", weights_only=True))
            check_floating_point(tensors)
    path = folder / "adapter_model.safetensors"
    check_is_file(path)
    with errors_naming(path):
        factors = load_file(path)
        check_floating_point(factors)
    return tensors | factors


def check_adapter_config(config: dict, path: Path) -> None:
    with errors_naming(path):
        alpha = float(config["lora_alpha"])
    if not 0 < alpha < 1e9 or config.get("alpha_pattern"):
        raise ValueError(f"{path}: lora_alpha above 0, and no alpha_pattern, is expected.")


def check_floating_point(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise ValueError(f"{name} is expected to be a tensor of floating point.")
