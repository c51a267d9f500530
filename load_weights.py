"""A checkpoint directory becomes a model: where it lies, what its configuration says, what its tensors are called.
hub layout (`nvidia/audio-flamingo-3-hf`): one config.json, and safetensors that name tensors as the model does.
original layout (`nvidia/audio-flamingo-3`): llm/, sound_tower/ and sound_mm_projector/, each with its own.
"""
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from af3 import (AudioFlamingo3Config, AudioFlamingo3EncoderConfig, AudioFlamingo3ForConditionalGeneration,
                 GenerationConfig, Qwen2Config)

# what the network takes for granted: a config.json that says otherwise is refused by field
FIXED = {"activation_function": "gelu", "hidden_act": "silu", "projector_hidden_act": "gelu", "projector_bias": True,
         "scale_embedding": False, "use_sliding_window": False, "tie_word_embeddings": False, "rope_type": "default",
         "rope_scaling": None, "num_mel_bins": 128, "max_source_positions": 1500}
OLDER_KEYS = {"d_model": "hidden_size", "encoder_layers": "num_hidden_layers", "encoder_ffn_dim": "intermediate_size",
              "encoder_attention_heads": "num_attention_heads"}
# how names begin in files of peft, transformers 5 and the original layout -> how they then do; in turn, until the model's
SPELLINGS = {"base_model.model.": "", "model.language_model.": "language_model.model.", "model.": "",
             "lm_head.": "language_model.lm_head.", "llm.": "language_model.", "sound_tower.": "audio_tower.",
             "audio_tower.audio_tower.": "audio_tower.", "sound_mm_projector.": "multi_modal_projector.",
             "multi_modal_projector.layers.0": "multi_modal_projector.linear_1",
             "multi_modal_projector.layers.2": "multi_modal_projector.linear_2"}

# ---- Where a checkpoint lies ----
def find_checkpoint(name: str | Path) -> Path:
    """The directory `name`, or the local hub cache's snapshot of the hub model `name`. Nothing is downloaded."""
    if str(name) and Path(name).is_dir():
        return Path(name)
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    model = cache / f"models--{str(name).replace('/', '--')}"
    if (main := model / "refs" / "main").is_file() and (model / "snapshots" / main.read_text().strip()).is_dir():
        return model / "snapshots" / main.read_text().strip()
    raise FileNotFoundError(f"{name}: no such directory, and no such model in {cache}. To fetch the official one: "
                            "hf download nvidia/audio-flamingo-3-hf")

def tokenizer_folder(folder: Path) -> Path:
    return folder / "llm" if (folder / "llm").is_dir() else folder

# ---- What its configuration says ----
@contextmanager
def reading(path: Path) -> Iterator[None]:
    """A file's content that is not what the code inside takes it for becomes a ValueError that names the file."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: not a file.")
    try:
        yield
    except Exception as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: not what it should be ({error!r}).") from None

def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises OSError or ValueError, naming the file."""
    with reading(path):
        return {**json.loads(path.read_text(encoding="utf-8"))}

def read_token_ids(folder: Path) -> dict[str, int]:
    """Every token of tokenizer.json and its id."""
    with reading(path := folder / "tokenizer.json"):
        tokenizer = read_json(path)
        return tokenizer["model"]["vocab"] | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}

def named_ids(folder: Path, ids: dict[str, int]) -> dict[str, int]:
    """The ids of the tokens that tokenizer_config.json names: pad_token_id, then eos_token_id. Refuses one not in `ids`."""
    path, named = folder / "tokenizer_config.json", {}
    config = read_json(path)
    for key in ("pad_token", "eos_token"):
        token = config.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if not isinstance(token, str) or not {token, "<sound>", "<|im_start|>", "<|im_end|>"} <= ids.keys():
            raise ValueError(f"{path}: {key} is {token!r}; tokenizer.json beside it must add that, <sound> and <|im_…|>.")
        named[f"{key}_id"] = ids[token]
    return named

def known_fields(cls: type, section: dict) -> dict:
    return {f.name: section[f.name] for f in fields(cls) if section.get(f.name) is not None}

def read_section(cls: type, section: dict, path: Path):
    """An instance of a configuration dataclass from its section of config.json, in either spelling of the keys."""
    with reading(path):
        section = section | (section.get("rope_parameters") or {})
    for key, value in FIXED.items():
        if section.get(key, value) != value:
            raise ValueError(f"{path}: {key} is {section[key]!r}; only {value!r} is supported.")
    config = cls(**known_fields(cls, {OLDER_KEYS.get(key, key): value for key, value in section.items()}))
    for f in fields(cls):
        value, most = getattr(config, f.name), 1 << (10 if "layers" in f.name else 24)
        if type(value) not in (int, f.type) or not 0 < value <= most:
            raise ValueError(f"{path}: {f.name} is {value!r}; {f.type.__name__} above 0 and up to {most} is expected.")
    heads = config.num_attention_heads
    if config.hidden_size % heads or heads % getattr(config, "num_key_value_heads", 1):
        raise ValueError(f"{path}: hidden_size, num_attention_heads and num_key_value_heads do not divide.")
    return config

def read_config(folder: Path, ids: dict[str, int]) -> AudioFlamingo3Config:
    """The model's configuration, in either layout, checked against `ids`, the tokenizer's."""
    path = folder / "config.json"
    config = read_json(path)
    if config.get("model_type") not in ("audioflamingo3", "llava_llama"):  # hub, original
        raise ValueError(f"{path}: model_type is {config.get('model_type')!r}; an audioflamingo3 checkpoint is expected.")
    if (folder / "llm").is_dir():
        audio_path, path = folder / "sound_tower" / "config.json", folder / "llm" / "config.json"
        audio, text = read_json(audio_path), read_json(path)
    else:
        with reading(audio_path := path):
            audio, text = (config | (config.get(name) or {}) for name in ("audio_config", "text_config"))
    audio, text = read_section(AudioFlamingo3EncoderConfig, audio, audio_path), read_section(Qwen2Config, text, path)
    sound = config.get("audio_token_id", ids.get("<sound>"))
    if (text.vocab_size, sound) != (len(ids), ids.get("<sound>")) or {*ids.values()} != {*range(len(ids))}:
        raise ValueError(f"{path}: vocab_size is {text.vocab_size} and <sound> is {sound}; "
                         f"tokenizer.json beside it has {len(ids)} tokens, of which <sound> is {ids.get('<sound>')}.")
    return AudioFlamingo3Config(audio, text, sound)

def read_generation_config(folder: Path, ids: dict[str, int]) -> GenerationConfig:
    """generation_config.json's fields; end and padding ids it does not give are the tokenizer's."""
    with reading(path := folder / "generation_config.json"):
        given = known_fields(GenerationConfig, read_json(path)) if path.exists() else {}
        return GenerationConfig(**named_ids(folder, ids) | given)

# ---- What its tensors are ----
def read_tensors(folder: Path, apart: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under the model's name for it, memory-mapped; if `apart` each by itself, so that it can leave alone."""
    for part in ("llm", "sound_tower", "sound_mm_projector") if (folder / "llm").is_dir() else ("",):
        index = folder / part / "model.safetensors.index.json"
        with reading(index):
            shards = set(map(str, read_json(index)["weight_map"].values())) if index.exists() else ["model.safetensors"]
        for shard in shards:
            if not re.fullmatch(r"[^/\\]+\.safetensors", shard):
                raise ValueError(f"{index}: names {shard!r}; names of safetensors files beside it are expected.")
            with reading(path := folder / part / shard):
                file = safe_open(path, "pt")
                for name in file.keys():
                    tensor = (safe_open(path, "pt") if apart else file).get_tensor(name)
                    yield model_name(f"{part}.{name}".removeprefix(".")), tensor

def model_name(name: str) -> str:
    for spelling, ours in SPELLINGS.items():
        name = ours + name.removeprefix(spelling) if name.startswith(spelling) else name
    return name

def load_model(path: str | Path, device_map: str | torch.device = "auto", dtype: torch.dtype | str = "auto",
               int8: bool = False, think: bool = False) -> AudioFlamingo3ForConditionalGeneration:
    """The model of a checkpoint directory in either layout, or of a hub name; for inference.
    device_map: "auto" is CUDA, else MPS, else the CPU. dtype: "auto" is the checkpoint's own, else a torch.dtype or its
    name. int8: the decoder's linear layers are quantised. think: the AF-Think adapter beside the checkpoint is merged in.
    Raises FileNotFoundError or ValueError, naming file, field or tensor; nothing half-loaded is returned.
    """
    folder = find_checkpoint(path)
    if device_map == "auto":
        device_map = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    ids = read_token_ids(tokenizer_folder(folder))
    with torch.device("meta"):
        model = AudioFlamingo3ForConditionalGeneration(read_config(folder, ids))
    model.generation_config = read_generation_config(tokenizer_folder(folder), ids)
    try:
        model.load_state_dict(dict(read_tensors(folder, apart=int8)), strict=True, assign=True)
        model.requires_grad_(False).eval()
        dtype = model.dtype if dtype == "auto" else getattr(torch, str(dtype), dtype)
        if dtype not in (torch.float32, torch.bfloat16, torch.float16)[:3 - int8]:  # int8's products overflow in float16
            raise ValueError(f"dtype is {dtype!r}; float32, bfloat16 or, without int8, float16 is expected.")
        if think:
            from ways import merge_adapter
            merge_adapter(model, folder, dtype)
        if int8:
            from ways import quantise
            quantise(model.language_model)
        return model.to(device_map, dtype)
    except (RuntimeError, AssertionError, ImportError) as error:  # tensors that do not fit; no such device
        raise ValueError(f"{folder} on {device_map}: {' '.join(str(error).split())}") from None
