"""LoRA adapters (Hu et al. 2021): layers to train them, and their files, in the format of `peft`.

An adapter leaves a weight W (out, in) unchanged and learns an update, the product of two low-rank
matrices: W + scale * B @ A, with A (rank, in), B (out, rank) and scale = alpha / rank.
finetune.py trains adapters; AF-Think is one from NVIDIA. For inference an adapter is merged into
the weights, so the model is as fast as without it.
"""

import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from load_weights import TRANSFORMERS_5_NAMES, model_name
from plumbing.check_adapter import (
    check_adapter_config,
    check_agree,
    check_is_not_empty,
    check_pair,
    check_places,
    check_rank,
    check_saved_modules,
    check_shape,
    check_tensors,
)
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

# The name of a tensor in an adapter is that of a layer, between this prefix and one of the suffixes
# of A and B. An embedding has the second pair.
PREFIX = "base_model.model."  # peft wraps the model twice
FACTORS = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))

# Beside the factors of these, peft saves a copy of their weight.
EMBEDDINGS = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")


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
            tensors[f"{PREFIX}{layer}.lora_A.weight"] = module.lora_A.detach().cpu()
            tensors[f"{PREFIX}{layer}.lora_B.weight"] = module.lora_B.detach().cpu()
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


class Pair(NamedTuple):
    """A layer's two factors: its name and theirs, in the adapter's file."""

    layer: str
    a: str
    b: str


@torch.no_grad()
def merge_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Merges the adapter in a directory, in the format of `peft`, into the model's weights.

    The sum is computed in float32 and rounded once, to the weight's dtype. Tensors trained in full
    (for example in non_lora_trainables.bin, if it exists) replace the model's own. Returns the
    model. Raises FileNotFoundError, or ValueError, for example for an unsupported variant of LoRA,
    or for tensors that have no place in the model; the model is then unchanged.
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
    earlier = getattr(model, "before_adapters", {})  # the weights that other adapters changed
    with errors_naming(folder):
        whole, pairs = find_places(tensors)
        check_places(whole, weights)
        check_places({name: pair.a for name, pair in pairs.items()}, weights)
        check_saved_modules(config, whole)
        bases = {name: weights[name] for name in pairs}  # what the updates are added to
        for name, source in whole.items():
            check_shape(source, tensors[source], weights[name].shape)
            bases[name] = replacement(name, tensors[source], weights[name], earlier)
        for name, pair in pairs.items():
            check_factors(bases[name], pair, tensors, config)

    # Nothing above changes the model, and nothing below is refused. One weight at a time: a copy of
    # all that change could be as large as the model.
    originals = {}
    for name, base in bases.items():
        originals[name] = base.clone() if name in EMBEDDINGS else None
        if name in pairs:
            base = add_update(base, pairs[name], tensors, config)
        weights[name].copy_(base)
    model.before_adapters = originals | earlier
    return model.requires_grad_(False)


def find_places(tensors: dict[str, Tensor]) -> tuple[dict[str, str], dict[str, Pair]]:
    """The tensors that replace a weight, and the pairs of factors whose product is added to one.

    Both by the model's name of the weight.
    """
    whole = {}
    pairs = {}
    for name, tensor in tensors.items():
        pair = find_pair(name)
        if pair is not None:
            check_pair(pair.a, pair.b, tensors)
            place = merged_name(f"{pair.layer}.weight")
            other = pairs.setdefault(place, pair)
            check_agree(pair.layer, other.layer, pair == other)
        elif not is_frozen_copy(name, tensors):
            place = merged_name(name)
            other = whole.setdefault(place, name)
            check_agree(name, other, torch.equal(tensor, tensors[other]))
    return whole, pairs


def find_pair(name: str) -> Pair | None:
    """The pair of factors to which a tensor of this name belongs."""
    for end_of_a, end_of_b in FACTORS:
        if name.endswith((end_of_a, end_of_b)):
            layer = name.removesuffix(end_of_a).removesuffix(end_of_b)
            return Pair(layer, layer + end_of_a, layer + end_of_b)
    return None


def is_frozen_copy(name: str, tensors: dict[str, Tensor]) -> bool:
    """Whether this is the original of a tensor that was trained, and is in the file, too."""
    trained = name.replace(".original_module.", ".modules_to_save.")
    return trained != name and trained in tensors


def merged_name(name: str) -> str:
    """The model's name for a tensor of an adapter, without what peft adds to it."""
    name = model_name(name.removeprefix(PREFIX))
    name = name.replace(".base_layer.", ".")  # the weight beside factors
    return name.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")


def replacement(name: str, tensor: Tensor, weight: Tensor, earlier: dict) -> Tensor:
    """What replaces a weight: a tensor of the adapter, unless it is only a copy of the original.

    Such a copy must not undo what an earlier adapter changed. Any other tensor cannot be combined
    with an earlier adapter: ValueError.
    """
    tensor = tensor.to(weight.device)
    if name not in earlier or torch.equal(tensor.to(weight), weight):
        return tensor
    original = earlier[name]
    if original is None or not torch.equal(tensor.to(original), original):
        raise ValueError(
            f"{name} was changed by an earlier adapter, and would be replaced; merge this one first."
        )
    return weight


def check_factors(base: Tensor, pair: Pair, tensors: dict[str, Tensor], config: dict) -> None:
    """Refuses factors that do not fit their weight, or whose rank is not that of the adapter."""
    a, b = tensors[pair.a], tensors[pair.b]
    rank = len(a) if a.dim() > 0 else 0
    if pair.a.endswith(".weight"):
        check_shape(pair.a, a, (rank, *base.shape[1:]))
        check_shape(pair.b, b, (len(base), rank, *[1] * (base.dim() - 2)))
    else:  # an embedding
        check_shape(pair.a, a, (rank, len(base)))
        check_shape(pair.b, b, (base.shape[1], rank))
    layer = pair.layer.removeprefix(PREFIX)
    expected = value_for_layer(config.get("rank_pattern"), layer, config.get("r", 8))
    check_rank(layer, rank, expected)


def add_update(base: Tensor, pair: Pair, tensors: dict[str, Tensor], config: dict) -> Tensor:
    """A weight plus scale * B @ A, in float32."""
    a = tensors[pair.a].to(base.device).float()  # (rank, in), of a convolution (rank, in, kernel)
    b = tensors[pair.b].to(base.device).float()  # (out, rank), of a convolution (out, rank, 1)
    scale = lora_scale(config, pair.layer.removeprefix(PREFIX), rank=len(a))
    if not pair.a.endswith(".weight"):
        a, b = b.T, a.T  # the weight of an embedding is (in, out)
    update = torch.addmm(base.float().flatten(1), b.flatten(1), a.flatten(1), alpha=scale)
    return update.view(base.shape)


def lora_scale(config: dict, layer: str, rank: int) -> float:
    """A layer's alpha / rank, or alpha / sqrt(rank) if the adapter is rank-stabilized."""
    alpha = value_for_layer(config.get("alpha_pattern"), layer, config["lora_alpha"])
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def value_for_layer(patterns: dict | None, layer: str, default):
    """The value of the first pattern that matches a layer's name, or its end after a dot.

    This is peft's rule. peft sorts the patterns when it saves them.
    """
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return default


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """Reads the tensors of an adapter's one or two files, under their names in the files."""
    path = folder / OTHERS
    tensors = read_pickle(path) if path.exists() else {}
    path = folder / "adapter_model.safetensors"
    older = folder / "adapter_model.bin"
    if older.exists() and not path.exists():  # as in peft
        path = older
        factors = read_pickle(path)
    else:
        check_is_complete(path)
        with errors_naming(path):
            factors = load_file(path)
            check_tensors(factors)
    with errors_naming(path):
        check_is_not_empty(factors)
    return tensors | factors


def read_pickle(path: Path) -> dict[str, Tensor]:
    check_is_file(path)
    with errors_naming(path):
        # A pickle can run code when it is loaded. weights_only allows only tensors.
        tensors = dict(torch.load(path, map_location="cpu", weights_only=True))
        check_tensors(tensors)
    return tensors
