"""Input validation for the model and the processor: a ValueError of one line that says what is
wrong, what was expected, and what to do."""

import math
import re
from dataclasses import fields, replace

import numpy as np
import torch
from torch import Tensor, nn

from plumbing.transformers_conventions import (
    OTHER_NAMES,
    check_conventions,
    is_neutral_option,
    without_groups,
)

# ---- The model ----

# The processor's tensors for the audio.
AUDIO_TENSORS = ("input_features", "feature_attention_mask", "window_index")


def prepare_inputs(
    input_ids: Tensor, attention_mask: Tensor | None, audio: dict[str, Tensor | None]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The attention mask as (B, T) bool, all True if there is none, and the audio tensors.

    The mask of the features may have either of its two names; tensors that are None are dropped.
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    attention_mask = attention_mask.bool()
    if attention_mask.shape != input_ids.shape or not bool(attention_mask.any(dim=1).all()):
        raise ValueError("attention_mask must have the shape of input_ids, and a 1 in every row.")
    tensors = {}
    for name, tensor in audio.items():
        if tensor is not None:
            tensors[OTHER_NAMES.get(name, name)] = tensor
    if ("input_features" in tensors) != ("feature_attention_mask" in tensors):
        raise ValueError("input_features and feature_attention_mask are expected together.")
    if len(tensors.get("window_index", [])) > len(tensors.get("input_features", [])):
        raise ValueError("window_index is longer than input_features.")
    return attention_mask, tensors


def separate_options(arguments: dict, defaults) -> tuple[dict, object]:
    """The audio tensors among the arguments of `generate`, and its options.

    defaults: a `GenerationConfig`; options that are absent keep their value in it, and so do
    options that are None, except top_k and top_p, for which None means no limit.
    """
    names = [option.name for option in fields(defaults)]
    audio = {}
    options = {}
    for name, value in arguments.items():
        if name in (*AUDIO_TENSORS, *OTHER_NAMES):
            audio[name] = value
        elif is_neutral_option(name, value):
            continue
        elif name not in names:
            raise ValueError(f"generate() has no option {name!r}; it has {', '.join(names)}.")
        elif value is not None or name in ("top_k", "top_p"):
            options[name] = value
    return audio, replace(defaults, **options)


def check_room(input_ids: Tensor, max_new_tokens: int, text_config, cache) -> None:
    """Refuses a prompt that does not fit, with its answer, into the model's positions or `cache`."""
    if cache is None:
        check_length(input_ids.shape[1], max_new_tokens, text_config.max_position_embeddings)
    else:
        check_length(cache.length + input_ids.shape[1], max_new_tokens, cache.capacity)


def check_length(num_tokens: int, max_new_tokens: int, limit: int) -> None:
    if num_tokens + max_new_tokens > limit:
        raise ValueError(
            f"The prompt's {num_tokens} tokens and max_new_tokens={max_new_tokens} are more than "
            f"the model's {limit} positions; shorten the prompt or its audio, "
            "or lower max_new_tokens."
        )


def check_finite(logits: Tensor, model: nn.Module) -> None:
    """Reports the tensor that made the logits NaN or infinite."""
    if bool(logits.isfinite().all()):
        return
    culprit = "none; a product has overflowed"
    for name, tensor in model.state_dict().items():
        if not bool(tensor.isfinite().all()):
            culprit = name
            break
    raise ValueError(
        f"The first logits are not finite. The first tensor with NaN or infinity: {culprit}."
    )


# The kind of each number among the options of `generate`, its smallest and its largest value.
OPTION_RANGES = {
    "max_new_tokens": (int, 1, 10**9),
    "temperature": (float, 1e-6, 10**6),
    "top_k": (int, 0, 10**9),
    "top_p": (float, 1e-6, 1),
    "repetition_penalty": (float, 1e-6, 10**6),
    "pad_token_id": (int, 0, 10**9),
}


# They have no effect in greedy decoding, so any number will do there: files say 0 or -1.
SAMPLING_OPTIONS = ("temperature", "top_k", "top_p")


def check_generation_options(options: dict) -> None:
    """Refuses a value out of range by its name; top_k and top_p may be None."""
    do_sample = options.get("do_sample", False)
    if not isinstance(do_sample, bool):
        raise ValueError(f"do_sample is {do_sample!r}; true or false is expected.")
    for name, (kind, smallest, largest) in OPTION_RANGES.items():
        if name in SAMPLING_OPTIONS and not do_sample:
            smallest, largest = -math.inf, math.inf
        if name in options and (options[name] is not None or name not in ("top_k", "top_p")):
            check_number(name, options[name], kind, smallest, largest)
    end_ids = options.get("eos_token_id", [])
    for end_id in end_ids if isinstance(end_ids, list) else [end_ids]:
        check_number("eos_token_id", end_id, int, 0, 10**9)


def check_number(name: str, value, kind: type, smallest: float, largest: float) -> None:
    if not isinstance(value, (int, kind)) or not smallest <= value <= largest:
        expected = "a number" if kind is float else "a whole number"
        if math.isfinite(smallest):
            expected += f" from {smallest} to {largest}"
        raise ValueError(f"{name} is {value!r}; {expected} is expected.")


# ---- The processor: options and prompts ----


def check_processor_options(**options) -> dict:
    """The options of `processor(...)` and `apply_chat_template`, without mere conventions."""
    options = without_groups(options)
    padding_side = options.pop("padding_side", "left")
    output_labels = options.pop("output_labels", False)
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side is {padding_side!r}; 'left' or 'right' is expected.")
    if output_labels not in (False, True, "answer"):
        raise ValueError(
            f"output_labels is {output_labels!r}; False, True or 'answer' is expected."
        )
    check_conventions(options)
    return {"padding_side": padding_side, "output_labels": output_labels}


def check_plain_prompt(prompt: str) -> None:
    """Refuses a prompt that `processor(...)` would take for a finished template."""
    if prompt.startswith("<|im_start|>"):
        raise ValueError("The prompt starts with <|im_start|>; ask in plain words.")


def check_no_long_whitespace(text: str) -> None:
    if re.search(r"\s{100000}", text):
        raise ValueError(
            "100,000 spaces or line ends in a row are more than the tokenizer can split; "
            "leave some out."
        )


# ---- The processor: audio ----


def check_samples(samples: np.ndarray, name: str, min_samples: int) -> None:
    if samples.ndim != 1 or samples.dtype.kind not in "fiu":
        raise ValueError(
            f"{name}: audio of shape {samples.shape}, {samples.dtype}; "
            "1-D floats or integers are expected."
        )
    if len(samples) < min_samples:
        plural = "" if len(samples) == 1 else "s"
        raise ValueError(
            f"{name}: audio of {len(samples)} sample{plural}; "
            f"at least {min_samples} (a little over 20 ms at 16 kHz) are expected."
        )


def check_finite_samples(samples: np.ndarray, name: str) -> None:
    if not (np.abs(samples) < 2.0**32).all():  # the mel power of larger ones is infinite
        raise ValueError(
            f"{name}: audio holds samples that are NaN or infinite or far too large; "
            "numbers from -1 to 1 are expected."
        )
