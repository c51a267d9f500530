"""LoRA adapters (Hu et al. 2021): layers to train them, and their files, in the format of `peft`.

An adapter leaves a weight W (out, in) unchanged and learns an update, the product of two low-rank
matrices: W + scale * B @ A, with A (rank, in), B (out, rank) and scale = alpha / rank.
finetune.py trains adapters; AF-Think is one from NVIDIA. For inference an adapter is merged into
the weights, so the model is as fast as without it.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from load_weights import TRANSFORMERS_5_NAMES, model_name
from plumbing.check_checkpoint import check_is_complete
from plumbing.download import how_to_complete
from plumbing.find_checkpoint import find_checkpoint, find_folder
from plumbing.json_file import check_exists, check_is_file, errors_naming, read_json
from plumbing.save_checkpoint import new_files, write_json

DECODER_LINEARS = (
    *("q_proj", "k_proj", "v_proj", "o_proj"),  # attention
    *("gate_proj", "up_proj", "down_proj"),  # feed-forward
)
HEAD = "lm_head"  # for answers in words that the model rarely generates

OTHERS = "non_lora_trainables.bin"  # tensors trained in full, besides the factors


# ---- Layers to train ----


class LoraLinear(nn.Module):
    """A linear layer that is not trained, and the two factors of the update to its weight."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.linear = linear
        self.rank = rank
        self.alpha = alpha
        # In float32 whatever the weight's dtype: training steps are too small for bfloat16.
        like = {"dtype": torch.float32, "device": linear.weight.device}
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as in a new nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        added = F.linear(F.linear(x.float(), self.lora_A), self.lora_B)  # (..., out)
        added = added * (self.alpha / self.rank)
        return self.linear(x) + added.to(x.dtype)


def choose_layers(model: nn.Module, targets: tuple[str, ...], projector: bool) -> list[str]:
    """The full names of the decoder's linear layers called q_proj or another of `targets`.

    Includes the projector's linear layers if `projector` is true.
    """
    names = []
    for name, module in model.named_modules():
        in_decoder = name.startswith("language_model.")
        in_projector = name.startswith("multi_modal_projector.")
        is_target = in_decoder and name.rpartition(".")[2] in targets
        if is_target or (in_projector and projector):
            names.append(name)
    return names


def add_factors(model: nn.Module, name: str, rank: int, alpha: float) -> None:
    """Replaces the linear layer of this name by a `LoraLinear`."""
    parent, _, child = name.rpartition(".")
    lora = LoraLinear(model.get_submodule(name), rank, alpha)
    setattr(model.get_submodule(parent), child, lora)


# ---- Writing an adapter ----


def save_adapter(model: nn.Module, output: str | Path, base_model: str | None = None) -> None:
    """Writes the factors of a model as peft does for transformers' model.

    base_model: the name of the checkpoint they were trained on.
    """
    layers = []
    tensors = {}
    config = {"peft_type": "LORA", "base_model_name_or_path": base_model, "bias": "none"}
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            layer = transformers_name(name)
            layers.append(layer)
            tensors[f"base_model.model.{layer}.lora_A.weight"] = module.lora_A.detach().cpu()
            tensors[f"base_model.model.{layer}.lora_B.weight"] = module.lora_B.detach().cpu()
            config |= {"r": module.rank, "lora_alpha": module.alpha}
    config |= {"target_modules": layers, "inference_mode": True}
    with new_files(output) as folder:
        write_json(folder / "adapter_config.json", config)
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def transformers_name(name: str) -> str:
    """A module's name in transformers' model, which differs from that in its checkpoint."""
    name = f"{name}."
    for theirs, ours in TRANSFORMERS_5_NAMES.items():
        if name.startswith(ours):
            name = theirs + name.removeprefix(ours)
            break
    return name.removesuffix(".")


# ---- Reading and merging one ----


def find_think_adapter(path: str | Path) -> Path:
    """AF-Think's adapter in a checkpoint: think/, or stage35/ in the original layout."""
    folder = find_checkpoint(path)
    original = folder / "stage35"
    think = original if original.is_dir() else folder / "think"
    if not think.is_dir():
        raise FileNotFoundError(
            f"{think}: no such directory; the AF-Think adapter is expected there, or in stage35/."
            f"{how_to_complete(think / OTHERS)}"
        )
    check_exists(think / OTHERS)  # AF-Think has weights besides its factors
    return think


def merge_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Merges the adapter in a directory, in the format of `peft`, into the model's weights.

    The sum is computed in float32 and rounded once, to the weight's dtype. Tensors trained in full
    (in non_lora_trainables.bin, if it exists) replace the model's own. Returns the model. Raises
    FileNotFoundError, or ValueError, for example for tensors that have no place in the model.
    """
    folder = find_folder(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such directory; an adapter is expected.")
    config_path = folder / "adapter_config.json"
    if not config_path.exists():
        raise FileNotFoundError(f"{folder}: no adapter_config.json inside; an adapter is expected.")
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
    """The model's name for a tensor of an adapter; .base_layer. marks the weight beside factors."""
    name = name.removeprefix("base_model.model.")  # peft wraps the model twice
    return model_name(name).replace(".base_layer.", ".")


def lora_scale(config: dict, rank: int) -> float:
    """lora_alpha / rank, or lora_alpha / sqrt(rank) for a rank-stabilized adapter."""
    if config.get("use_rslora"):
        return config["lora_alpha"] / rank**0.5
    return config["lora_alpha"] / rank


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """Reads the tensors of an adapter's one or two files, under their names in the files."""
    tensors = {}
    path = folder / OTHERS
    check_is_file(path)
    if path.exists():
        with errors_naming(path):
            # A pickle can run code when it is loaded. weights_only allows only tensors.
            tensors = dict(torch.load(path, map_location="cpu", weights_only=True))
            check_floating_point(tensors)
    path = folder / "adapter_model.safetensors"
    check_is_complete(path)
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
            raise ValueError(f"{name} is expected to be a floating-point tensor.")
