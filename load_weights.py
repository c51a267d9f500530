"""A checkpoint directory becomes a model: where it lies, what its two official layouts are called, how it is read.

hub layout, `nvidia/audio-flamingo-3-hf`: one config.json, safetensors shards with the model's own tensor names.
original layout, `nvidia/audio-flamingo-3`: llm/, sound_tower/, sound_mm_projector/, each with config and safetensors.
"""
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from af3 import AudioFlamingo3Config, AudioFlamingo3ForConditionalGeneration, GenerationConfig

# what the network takes for granted; a config.json that says otherwise is refused by field
FIXED = {"activation_function": "gelu", "hidden_act": "silu", "projector_hidden_act": "gelu", "projector_bias": True,
         "scale_embedding": False, "use_sliding_window": False, "tie_word_embeddings": False, "rope_type": "default"}
# the original layout: folder, the prefix its tensors have in the model, the names that differ
ORIGINAL = [("llm", "language_model.", {}), ("sound_tower", "audio_tower.", {}),
            ("sound_mm_projector", "multi_modal_projector.", {"layers.0.": "linear_1.", "layers.2.": "linear_2."})]


def find_checkpoint(name: str | Path) -> Path:
    """The directory of a checkpoint: `name` itself, or the local hub cache's latest snapshot of the hub model `name`.

    Nothing is downloaded: FileNotFoundError gives the command that does.
    """
    if Path(name).is_dir():
        return Path(name)
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{str(name).replace('/', '--')}"
    reference = cache / "refs" / "main"
    if reference.is_file():
        snapshot = cache / "snapshots" / reference.read_text().strip()
        if snapshot.is_dir():
            return snapshot
    raise FileNotFoundError(f"{name}: no such directory, and no such model in {cache.parent}; "
                            "to fetch the model: hf download nvidia/audio-flamingo-3-hf")


def read_json(path: Path) -> dict:
    """A JSON file's object. Raises FileNotFoundError or ValueError, either naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error}).") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a JSON object is expected.")
    return content


def read_config(folder: Path) -> AudioFlamingo3Config:
    """The configuration of a checkpoint in either layout."""
    if (folder / "llm").is_dir():
        tokens = read_json(folder / "llm" / "tokenizer.json")["added_tokens"]
        config = {"text_config": read_json(folder / "llm" / "config.json"),
                  "audio_config": read_json(folder / "sound_tower" / "config.json"),
                  "audio_token_id": next(token["id"] for token in tokens if token["content"] == "<sound>")}
    else:
        config = read_json(folder / "config.json")
    text, audio = config.get("text_config") or {}, config.get("audio_config") or {}
    for section in (config, text, audio, text.get("rope_parameters") or {}):
        for key, value in FIXED.items():
            if section.get(key, value) != value:
                raise ValueError(f"{folder}: config.json: {key} is {section[key]!r}; this model's is {value!r}.")
    return AudioFlamingo3Config.from_dict(config)


def shards(folder: Path) -> list[Path]:
    """The safetensors files of one folder: those its index names, or the only one."""
    index = folder / "model.safetensors.index.json"
    names = sorted(set(read_json(index)["weight_map"].values())) if index.exists() else ["model.safetensors"]
    return [folder / name for name in names]


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors under the model's own names, memory-mapped: nothing is read before it is used."""
    parts = ORIGINAL if (folder / "llm").is_dir() else [("", "", {})]
    tensors = {}
    for part, prefix, renamed in parts:
        for path in shards(folder / part):
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():
                        new = prefix + next((name.replace(old, new) for old, new in renamed.items() if name.startswith(old)), name)
                        tensors[new] = file.get_tensor(name)
            except FileNotFoundError:
                raise FileNotFoundError(f"{path}: no such file.") from None
            except SafetensorError as error:
                raise ValueError(f"{path}: not a whole safetensors file ({error}).") from None
    return tensors


def load_model(path: str | Path, device_map: str = "auto", dtype: torch.dtype | str = "auto") -> AudioFlamingo3ForConditionalGeneration:
    """The model of a checkpoint, in evaluation mode.

    device_map: "auto" (CUDA, else MPS, else CPU) or a device. dtype: "auto" (the checkpoint's own), a torch.dtype or its name.
    Raises FileNotFoundError or ValueError, naming the file or every tensor that is missing, unexpected or misshapen.
    """
    folder = find_checkpoint(path)
    config = read_config(folder)
    with torch.device("meta"):
        model = AudioFlamingo3ForConditionalGeneration(config)
    tensors = read_tensors(folder)
    check_tensors(folder, {name: parameter.shape for name, parameter in model.state_dict().items()}, tensors)
    model.load_state_dict(tensors, strict=True, assign=True)
    if dtype == "auto":
        dtype = model.dtype
    if device_map == "auto":
        device_map = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    model.generation_config = GenerationConfig(**{k: v for k, v in read_json(folder / "generation_config.json").items() if k in GenerationConfig.__dataclass_fields__})
    return model.requires_grad_(False).eval().to(device_map, getattr(torch, dtype) if isinstance(dtype, str) else dtype)


def check_tensors(folder: Path, expected: dict[str, torch.Size], found: dict[str, Tensor]) -> None:
    """ValueError where names or shapes differ."""
    faults = [f"missing {name}" for name in expected if name not in found]
    faults += [f"unexpected {name}" for name in found if name not in expected]
    faults += [f"{name} is {list(found[name].shape)}, config.json says {list(shape)}"
               for name, shape in expected.items() if name in found and found[name].shape != shape]
    if faults:
        raise ValueError(f"{folder}: the tensors are not this model's: " + "; ".join(faults))
