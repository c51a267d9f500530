"""What code written for transformers expects, and what carries no idea of its own."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from plumbing.find_checkpoint import find_checkpoint
from plumbing.json_file import read_json
from plumbing.save_checkpoint import save_model

# ---- The model ----


@dataclass
class CausalOutput:
    """What a call of the model returns."""

    logits: Tensor  # (B, T, V)
    loss: Tensor | None  # a scalar, if there were labels


class PretrainedModel(nn.Module):
    """A module with the attributes and `save_pretrained` of transformers' models."""

    source_config: dict = {}  # the config.json that it was loaded from

    @property
    def device(self) -> torch.device:
        return self.language_model.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.model.embed_tokens.weight.dtype

    def save_pretrained(self, path: str | Path) -> None:
        """Writes a checkpoint directory in the hub layout, without the processor's files.

        `from_pretrained` loads it, and so does transformers. Raises OSError or ValueError.
        """
        save_model(self, path)


def as_in_transformers(from_pretrained: Callable) -> Callable:
    """A decorator for the class method: `torch_dtype` is another name of `dtype`, and the model
    remembers its config.json, to save it again."""

    @wraps(from_pretrained)
    def call(cls, path: str | Path, *arguments, torch_dtype=None, **options) -> PretrainedModel:
        if torch_dtype is not None:
            options["dtype"] = torch_dtype
        model = from_pretrained(cls, path, *arguments, **options)
        model.source_config = read_json(find_checkpoint(path) / "config.json")
        return model

    return call


# The options of transformers' `generate` that change an answer and are not supported here, with
# the values that change nothing. None, [] and {} never do.
NEUTRAL_OPTIONS = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "constraints": None,
    "diversity_penalty": 0,
    "dola_layers": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "exponential_decay_length_penalty": None,
    "force_words_ids": None,
    "forced_bos_token_id": None,
    "forced_decoder_ids": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1,
    "max_length": None,
    "max_time": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "min_p": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "penalty_alpha": 0,
    "sequence_bias": None,
    "stop_strings": None,
    "suppress_tokens": None,
    "token_healing": False,
    "top_h": None,
    "typical_p": 1,
    "watermarking_config": None,
}


def is_neutral_option(name: str, value) -> bool:
    """Whether an option of transformers' `generate` asks for nothing but what is done here."""
    if name in ("labels", "use_cache", "cache_implementation"):  # the ids are the same
        return True
    if name in NEUTRAL_OPTIONS:
        return value in (None, [], {}, NEUTRAL_OPTIONS[name])
    return name in ("return_dict_in_generate", "output_scores", "output_logits") and not value


# ---- The processor ----


class FeatureExtractor:
    """The attributes of `processor.feature_extractor` that the published examples read."""

    def __init__(self, sampling_rate: int, chunk_length: int):
        self.sampling_rate = sampling_rate  # Hz
        self.chunk_length = chunk_length  # seconds of a window


class Batch(dict):
    """The model's tensors by name; `batch.input_ids` is `batch["input_ids"]`."""

    def __getattr__(self, name: str) -> Tensor:
        if name not in self:
            raise AttributeError(name)
        return self[name]

    def to(self, device=None, dtype: torch.dtype | None = None) -> "Batch":
        """The tensors on `device`; `dtype` is for floats only, ids and masks stay integers."""
        moved = Batch()
        for name, tensor in self.items():
            if tensor.is_floating_point():
                moved[name] = tensor.to(device, dtype)
            else:
                moved[name] = tensor.to(device)
        return moved


# Options that may be passed if they say what is always done here.
CONVENTIONS = {
    "return_tensors": ["pt"],
    "tensor_type": ["pt"],
    "padding": [True, "longest"],
    "sampling_rate": [None, 16000],
}


def check_conventions(options: dict) -> None:
    for name, value in options.items():
        if value in CONVENTIONS.get(name, []):
            continue
        if name == "sampling_rate":
            raise ValueError(
                f"sampling_rate is {value}; 16000 Hz is expected. Resample, or use load_audio."
            )
        if name == "tensor_type":
            raise ValueError(f"tensor_type is {value!r}; only 'pt' is supported.")
        raise ValueError(f"The processor has no option {name}={value!r}.")


def pair_texts_and_audios(text: str | list[str], audio) -> list[tuple]:
    """(prompt, recording) for each prompt; the recording is None where there is no audio.

    text, audio: one or a list.
    """
    texts = list(text)
    if isinstance(text, str):
        texts = [text]
    audios = [None] * len(texts)
    if audio is not None:
        audios = list_of_audios(audio)
    if len(texts) != len(audios):
        raise ValueError(f"Got {len(texts)} texts but {len(audios)} audios; they must match 1:1.")
    if not texts:
        raise ValueError("At least one prompt is expected.")
    return list(zip(texts, audios))


def list_of_audios(audio) -> list:
    """A list of recordings, of one or a list of them."""
    is_single = isinstance(audio, (str, Path, np.ndarray, Tensor))
    if not is_single:
        is_single = len(audio) == 0 or isinstance(audio[0], (int, float, np.number))
    if is_single:
        return [audio]
    return list(audio)


def list_of_conversations(conversations: list) -> list[list[dict]]:
    """A list of conversations, of one or a list of them."""
    if is_one_conversation(conversations):
        return [conversations]
    return conversations


def is_one_conversation(conversations: list) -> bool:
    """Whether it is a list of messages, and not of conversations."""
    return bool(conversations) and isinstance(conversations[0], dict)


def read_messages(messages: list[dict]) -> list[tuple[str, list[str], list]]:
    """The role of each message, its texts and its recordings, each in order.

    A message whose content is None is skipped.
    """
    check_messages(messages)
    read = []
    for message in messages:
        if message["content"] is not None:
            read.append((message["role"], *split_content(message)))
    return read


def check_messages(messages: list[dict]) -> None:
    good = len(messages) > 0
    for message in messages:
        good = good and isinstance(message, dict) and "role" in message and "content" in message
        good = good and isinstance(message["content"], (str, list, type(None)))
    if not good:
        raise ValueError(
            "A conversation of one or more messages, each with a role and content, is expected."
        )


def split_content(message: dict) -> tuple[list[str], list]:
    """The texts and the recordings of a message, each in order."""
    if isinstance(message["content"], str):
        return [message["content"]], []
    texts = []
    audios = []
    for part in message["content"]:
        fields = part
        if not isinstance(part, dict):
            fields = {}
        if fields.get("type") == "audio" or "audio" in fields:
            audios.append(fields.get("path") or fields.get("audio"))
        elif isinstance(fields.get("text"), str):
            texts.append(fields["text"])
        else:
            role = message["role"]
            raise ValueError(f"A {role} message has a part that is neither text nor audio.")
    return texts, audios
