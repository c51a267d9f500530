"""Checks of a LoRA adapter: only what extras/lora.py merges correctly is accepted.

`peft` has many variants of LoRA. The tensors of some look like those of plain LoRA, and only
adapter_config.json tells that they are used differently. So each of its fields must be in one of
the lists below, or unset.
"""

import json
import re
from pathlib import Path

from torch import Tensor

from plumbing.json_file import errors_naming

# Fields that extras/lora.py uses.
USED = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save")

# Fields that change nothing in the merge, whatever their value.
WITHOUT_EFFECT = {
    # where the adapter comes from
    *("auto_mapping", "base_model_name_or_path", "peft_version", "revision", "task_type"),
    # which layers were trained: those with factors in the file
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    # how it was trained
    *("inference_mode", "lora_dropout", "runtime_config.ephemeral_gpu_offload"),
    *("eva_config.rho", "eva_config.tau", "eva_config.use_label_mask"),
    *("eva_config.label_mask_value", "eva_config.whiten", "eva_config.adjust_scaling_factors"),
    # no layer of this model stores its weight transposed, and no two share one
    *("fan_in_fan_out", "ensure_weight_tying"),
    # used only beside use_qalora and megatron_config, which are not supported
    *("qalora_group_size", "megatron_core"),
}

# Fields of which some values are merged correctly.
SUPPORTED = {
    "peft_type": ("LORA",),
    "bias": ("none", "all", "lora_only"),
    # PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change the model's weights before the training, and
    # the adapter has no record of that.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva", "mica"),
}

# The other fields of peft 0.21. They must be unset: with them, the merge is not a plain sum.
UNSUPPORTED = (
    *("alora_invocation_tokens", "arrow_config", "corda_config", "kasa_config"),
    *("layer_replication", "loftq_config", "lora_bias", "lora_ga_config", "megatron_config"),
    *("monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora"),
    *("use_dora", "use_qalora", "velora_config"),
)


def check_adapter_config(config: dict, path: Path) -> None:
    """Refuses the fields of an adapter_config.json that describe anything but plain LoRA."""
    with errors_naming(path):
        if config.get("peft_type") != "LORA":  # first, as the other kinds have other fields
            refuse("peft_type", config.get("peft_type"), '"LORA" is expected')
        for field, value in flat_fields(config):
            check_field(field, value)
        check_used(config)


def flat_fields(config: dict) -> list[tuple[str, object]]:
    """The fields of a configuration, and those of its sections as `section.field`."""
    fields = []
    for field, value in config.items():
        if field in ("eva_config", "runtime_config") and isinstance(value, dict):
            fields += [(f"{field}.{name}", inner) for name, inner in value.items()]
        else:
            fields.append((field, value))
    return fields


def check_field(field: str, value) -> None:
    if field in (*USED, *WITHOUT_EFFECT):
        return
    if field in SUPPORTED:
        is_neutral = value in SUPPORTED[field]
    else:
        is_neutral = value is None or value is False or value in ([], {})
    if not is_neutral:
        is_known = field in SUPPORTED or field in UNSUPPORTED
        reason = "not supported" if is_known else "not known"
        raise ValueError(
            f"{field} is {shown(value)}, which is {reason}; "
            "if peft can merge this adapter, give the merged model as --model."
        )


def check_used(config: dict) -> None:
    """Checks the fields that the merge uses."""
    if not is_scale(config.get("lora_alpha")):
        refuse("lora_alpha", config.get("lora_alpha"), "a number above 0 is expected")
    if not is_rank(config.get("r", 8)):
        refuse("r", config["r"], "an integer above 0 is expected")
    if config.get("use_rslora") not in (None, False, True):
        refuse("use_rslora", config["use_rslora"], "true or false is expected")
    modules = config.get("modules_to_save") or []
    if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
        refuse("modules_to_save", modules, "a list of names is expected")
    for field, is_valid in (("rank_pattern", is_rank), ("alpha_pattern", is_scale)):
        patterns = config.get(field) or {}
        if not isinstance(patterns, dict) or not all(map(is_valid, patterns.values())):
            refuse(field, patterns, "names with numbers above 0 are expected")
        for pattern in patterns:
            check_pattern(pattern, field)


def refuse(field: str, value, expected: str) -> None:
    raise ValueError(f"{field} is {shown(value)}; {expected}.")


def check_pattern(pattern: str, field: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{field}: {pattern} is not a regular expression ({error}).") from None


def is_scale(value) -> bool:
    return type(value) in (int, float) and 0 < value < 1e9


def is_rank(value) -> bool:
    return type(value) is int and value > 0


def shown(value) -> str:
    """A value as in a JSON file; only the beginning of a long one."""
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


# ---- Tensors ----


def check_tensors(tensors: dict) -> None:
    """Refuses anything in an adapter's file but named tensors of finite floating-point numbers."""
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise ValueError(f"{name!r} is expected to be the name of a tensor.")
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise ValueError(f"{name} is expected to be a floating-point tensor.")
        if not tensor.float().isfinite().all():
            raise ValueError(f"{name} has values that are infinite or not a number.")


def check_is_not_empty(factors: dict) -> None:
    if not factors:
        raise ValueError("no tensors inside; the adapter is not complete.")


def check_places(places: dict[str, str], weights: dict[str, Tensor]) -> None:
    """Refuses tensors for which the model has no weight.

    places: the adapter's name for a tensor, by the model's name of the weight that it changes.
    """
    unplaced = [name for place, name in places.items() if place not in weights]
    if unplaced:
        others = f" and {len(unplaced) - 3} others" if len(unplaced) > 3 else ""
        raise ValueError(f"no place in the model for {', '.join(unplaced[:3])}{others}.")
    for place, name in places.items():
        if not weights[place].is_floating_point():
            raise ValueError(f"{name}: the model is quantized; merge its adapters before that.")


def check_pair(a: str, b: str, tensors: dict[str, Tensor]) -> None:
    for name, other in ((a, b), (b, a)):
        if name not in tensors:
            raise ValueError(f"{other} is there, but not {name}; the adapter is not complete.")


def check_agree(name: str, other: str, are_equal: bool) -> None:
    if not are_equal:
        raise ValueError(f"{name} and {other} are for the same weight, and differ.")


def check_rank(layer: str, rank: int, expected: int) -> None:
    if rank == 0 or rank != expected:
        raise ValueError(f"{layer} has factors of rank {rank}; r or rank_pattern is {expected}.")


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        shape = list(tensor.shape)
        raise ValueError(f"{name} has shape {shape}; {list(expected)} is expected.")


def check_saved_modules(config: dict, places: dict[str, str]) -> None:
    """Refuses an adapter that lacks a module that was trained in full beside the factors.

    places: as in `check_places`.
    """
    names = [f".{name}" for pair in places.items() for name in pair]
    for module in config.get("modules_to_save") or []:
        if not any(f".{module}." in name for name in names):
            raise ValueError(f"modules_to_save is for {module}, but no tensor of it is inside.")
