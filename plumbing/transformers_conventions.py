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


# Options of transformers' `from_pretrained` that change nothing here, with the values they may have.
HUB_OPTIONS = {
    "attn_implementation": (None, "sdpa", "eager"),
    "force_download": (None, False),
    "local_files_only": (None, True, False),
    "low_cpu_mem_usage": (None, True, False),
    "revision": (None, "main"),
    "token": (None, True, False),
    "trust_remote_code": (None, True, False),
    "use_fast": (None, True),
    "use_safetensors": (None, True),
}


def check_hub_options(options: dict) -> None:
    for name, value in options.items():
        if value not in HUB_OPTIONS.get(name, ()):
            raise ValueError(f"from_pretrained() has no option {name}={value!r}.")


def ignoring_hub_options(from_pretrained: Callable) -> Callable:
    """A decorator for the class method, which then takes `HUB_OPTIONS`, too."""

    @wraps(from_pretrained)
    def call(cls, path: str | Path, **options):
        check_hub_options(options)
        return from_pretrained(cls, path)

    return call


def as_in_transformers(from_pretrained: Callable) -> Callable:
    """A decorator for the class method: `torch_dtype` is another name of `dtype`, `HUB_OPTIONS` are
    taken, and the model remembers its config.json, to save it again."""

    @wraps(from_pretrained)
    def call(
        cls, path: str | Path, device_map="auto", dtype="auto", torch_dtype=None, **options
    ) -> PretrainedModel:
        check_hub_options(options)
        if torch_dtype is not None:
            dtype = torch_dtype
        model = from_pretrained(cls, path, device_map, dtype)
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


# transformers' names for tensors that have another name here.
OTHER_NAMES = {"input_features_mask": "feature_attention_mask"}


class Batch(dict):
    """The model's tensors by name; `batch.input_ids` is `batch["input_ids"]`.

    It answers to transformers' names, too: `batch["input_features_mask"]`.
    """

    def __getitem__(self, name: str) -> Tensor:
        return super().__getitem__(OTHER_NAMES.get(name, name))

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        super().__setitem__(OTHER_NAMES.get(name, name), tensor)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(OTHER_NAMES.get(name, name))

    def __contains__(self, name: object) -> bool:
        return super().__contains__(OTHER_NAMES.get(name, name))

    def get(self, name: str, default=None):
        return super().get(OTHER_NAMES.get(name, name), default)

    def pop(self, name: str, *default):
        return super().pop(OTHER_NAMES.get(name, name), *default)

    def __getattr__(self, name: str) -> Tensor:
        if name not in self:
            raise AttributeError(name)
        return self[name]

    def to(self, device=None, dtype: torch.dtype | None = None) -> "Batch":
        """The tensors on `device`; `dtype` is for floats only, ids and masks stay integers.

        As for a tensor, the dtype may be the only argument.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        moved = Batch()
        for name, tensor in self.items():
            if tensor.is_floating_point():
                moved[name] = tensor.to(device, dtype)
            else:
                moved[name] = tensor.to(device)
        return moved


# Options that may be passed if they say what is always done here.
CONVENTIONS = {
    "add_special_tokens": [True, False],  # the template has them all
    "chat_template": [None],
    "continue_final_message": [False],
    "documents": [None],
    "max_length": [None],
    "pad_to_multiple_of": [None],
    "padding": [True, "longest"],
    "return_attention_mask": [True],
    "return_tensors": ["pt"],
    "sampling_rate": [None, 16000],
    "tensor_type": ["pt"],
    "tools": [None],
    "truncation": [None, False],
}

# Dictionaries of further options.
GROUPS = ("processor_kwargs", "text_kwargs", "audio_kwargs", "common_kwargs")


def without_groups(options: dict) -> dict:
    """The options of the processor, with those in `GROUPS` among them."""
    flat = {}
    for name, value in options.items():
        if name not in GROUPS:
            flat[name] = value
        elif isinstance(value, dict):
            flat |= without_groups(value)
        elif value is not None:
            raise ValueError(f"{name} is {value!r}; a dictionary of options is expected.")
    return flat


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
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, (list, tuple)) or not all(isinstance(each, str) for each in texts):
        raise ValueError("A prompt or a list of prompts, each a string, is expected.")
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
    if isinstance(audio, (str, Path, np.ndarray, Tensor)):
        return [audio]
    if not isinstance(audio, (list, tuple)):
        raise ValueError(f"A recording or a list of recordings is expected, not {audio!r}.")
    if not audio:
        raise ValueError("The list of recordings is empty; at least one is expected.")
    if isinstance(audio[0], (int, float, np.number)):  # samples
        return [audio]
    return list(audio)


def list_of_prompts(prompt: str | list | None, default: str, audios: list) -> list[str]:
    """The prompts of recordings; `default` replaces None."""
    prompts = [prompt] * len(audios)
    if isinstance(prompt, (list, tuple)):
        prompts = prompt
    return [default if each is None else each for each in prompts]


def list_of_conversations(conversations: list) -> list[list[dict]]:
    """A list of conversations, of one or a list of them."""
    if not isinstance(conversations, (list, tuple)) or not conversations:
        raise ValueError("A conversation or a list of conversations is expected.")
    if is_one_conversation(conversations):
        return [conversations]
    return conversations


def is_one_conversation(conversations: list) -> bool:
    """Whether it is a list of messages, and not of conversations."""
    return bool(conversations) and isinstance(conversations[0], dict)


def read_messages(messages: list[dict]) -> list[tuple[str, list[str], list]]:
    """The role of each message, its texts and its recordings, each in order.

    A message whose content is None is an empty turn.
    """
    check_messages(messages)
    return [(message["role"], *split_content(message)) for message in messages]


def check_messages(messages: list[dict]) -> None:
    good = isinstance(messages, (list, tuple)) and len(messages) > 0
    for message in messages:
        good = good and isinstance(message, dict) and "role" in message and "content" in message
        good = good and isinstance(message["content"], (str, list, type(None)))
    if not good:
        raise ValueError(
            "A conversation of one or more messages, each with a role and content, is expected."
        )


def split_content(message: dict) -> tuple[list[str], list]:
    """The texts and the recordings of a message, each in order."""
    if message["content"] is None:
        return [], []
    if isinstance(message["content"], str):
        return [message["content"]], []
    texts = []
    audios = []
    for part in message["content"]:
        fields = part
        if not isinstance(part, dict):
            fields = {}
        if fields.get("type") == "audio" or "audio" in fields:
            audios.append(recording_of(fields, message["role"]))
        elif isinstance(fields.get("text"), str):
            texts.append(fields["text"])
        else:
            role = message["role"]
            raise ValueError(f"A {role} message has a part that is neither text nor audio.")
    return texts, audios


def recording_of(part: dict, role: str):
    """The file or the samples of an audio part. A "url" may be a file, too."""
    for key in ("path", "audio", "url"):
        if part.get(key) is not None:
            return part[key]
    raise ValueError(f'A {role} message has an audio part without "path" or "audio".')


def decodes_rows(decode: Callable) -> Callable:
    """A decorator for the method, which then takes one id, a row (T,), or rows (B, T) of them.

    For rows, it returns a list of texts.
    """

    @wraps(decode)
    def call(self, ids, *arguments, **options) -> str | list[str]:
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        if isinstance(ids, int):
            ids = [ids]
        if len(ids) > 0 and not isinstance(ids[0], (int, np.integer)) and is_row(ids[0]):
            return [call(self, row, *arguments, **options) for row in ids]
        return decode(self, ids, *arguments, **options)

    return call


def is_row(ids) -> bool:
    return isinstance(ids, (list, tuple)) or getattr(ids, "ndim", 0) > 0
