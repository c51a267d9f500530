"""Writes the reference data of the tests: a small checkpoint, an adapter, transformers' outputs.

    pip install transformers==5.23.0 peft librosa      only for this; the tests do not need them
    python tests/parity/make_goldens.py

tests/data/micro/         a seeded random checkpoint
tests/data/think/         a LoRA adapter for it, saved by peft
tests/data/goldens.npz    what transformers and peft compute from them
tests/data/goldens.json   transformers' token ids and chat templates
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AudioFlamingo3Config,
    AudioFlamingo3ForConditionalGeneration,
    AutoProcessor,
    AutoTokenizer,
    Qwen2Config,
)

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "support")]
from places import DATA, SHARED, TINY
from signals import CASES, conversation, sound

# ---- The checkpoint ----


def write_checkpoint(folder: Path) -> None:
    tokenizer = json.loads((TINY / "tokenizer.json").read_text())
    token_ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    config = small_config(token_ids)
    config.save_pretrained(folder)
    options = {"eos_token_id": [], "pad_token_id": token_ids["<|endoftext|>"]}
    (folder / "generation_config.json").write_text(json.dumps(options) + "\n")

    with torch.device("meta"):
        shapes = AudioFlamingo3ForConditionalGeneration(config).state_dict()
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, tensor in shapes.items():
        name = checkpoint_name(name)
        noise = torch.randn(tensor.shape, generator=generator)
        tensors[name] = initial_value(name, noise)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def small_config(token_ids: dict[str, int]) -> AudioFlamingo3Config:
    text_config = Qwen2Config(
        vocab_size=max(token_ids.values()) + 1,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=1e6,
        max_position_embeddings=4096,
    )
    audio_config = {
        "model_type": "audioflamingo3_encoder",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_mel_bins": 128,
        "max_source_positions": 1500,
    }
    config = AudioFlamingo3Config(
        text_config=text_config, audio_config=audio_config, audio_token_id=token_ids["<sound>"]
    )
    config.dtype = "float32"
    config.architectures = ["AudioFlamingo3ForConditionalGeneration"]
    return config


def checkpoint_name(name: str) -> str:
    """Converts the name of a tensor in transformers' model to its name in published checkpoints."""
    if name.startswith("lm_head"):
        return f"language_model.{name}"
    name = name.replace("model.language_model.", "language_model.model.")
    name = name.replace("model.audio_tower", "audio_tower")
    return name.replace("model.multi_modal", "multi_modal")


def initial_value(name: str, noise: Tensor) -> Tensor:
    """Large enough that every layer affects the logits, small enough that they stay finite."""
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.2 * noise
    if noise.ndim == 1 or "positions" in name:
        return 0.1 * noise
    if "embed" in name:
        return 0.5 * noise
    return 1.5 / noise[0].numel() ** 0.5 * noise


# ---- What transformers computes ----


def load(folder: Path, dtype: torch.dtype = torch.float32):
    return AudioFlamingo3ForConditionalGeneration.from_pretrained(folder, dtype=dtype)


def make_batch(processor, lengths: list[int], padding_side: str = "left"):
    return processor.apply_chat_template(
        [conversation(sound(length)) for length in lengths],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        processor_kwargs={"padding_side": padding_side},
    )


def case_goldens(folder: Path) -> dict[str, Tensor]:
    model = load(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    goldens = {}
    for case, lengths in CASES.items():
        sides = ["left", "right"] if len(lengths) > 1 else ["left"]
        for side in sides:
            batch = make_batch(processor, lengths, side)
            name = f"{case}.{side}"
            goldens |= forward_goldens(model, processor, batch, name)
            if side == "right" or len(lengths) == 1:
                # With left padding, transformers' loss includes predictions from padding.
                goldens[f"{name}.loss"] = compute_loss(model, processor, batch)
            if side == "left":
                goldens |= token_goldens(model, batch, name)
    return goldens


@torch.no_grad()
def forward_goldens(model, processor, batch, name: str) -> dict[str, Tensor]:
    """Returns samples of each stage; complete outputs would make the files large."""
    features = batch["input_features"]
    mask = batch["input_features_mask"]
    frames = model.get_audio_features(features, mask).pooler_output
    logits = model(**batch).logits[batch["attention_mask"].bool()]
    return {
        f"{name}.input_ids": batch["input_ids"],
        f"{name}.mel": features[:, ::8, ::37],
        f"{name}.mel_frames": mask.sum(-1),
        f"{name}.frames": frames[::13],
        f"{name}.logits": logits[::29],
    }


@torch.no_grad()
def compute_loss(model, processor, batch) -> Tensor:
    is_audio = batch["input_ids"] == processor.audio_token_id
    is_padding = batch["attention_mask"] == 0
    labels = batch["input_ids"].masked_fill(is_audio | is_padding, -100)
    return model(**batch, labels=labels).loss


def token_goldens(model, batch, name: str) -> dict[str, Tensor]:
    tokens = batch["input_ids"].shape[1]
    greedy = model.generate(**batch, do_sample=False, max_new_tokens=64)
    penalized = model.generate(**batch, do_sample=False, max_new_tokens=24, repetition_penalty=1.3)
    return {f"{name}.greedy": greedy[:, tokens:], f"{name}.penalised": penalized[:, tokens:]}


@torch.no_grad()
def bfloat16_distance(folder: Path) -> Tensor:
    """How far transformers' own logits in bfloat16 are from those in float32."""
    processor = AutoProcessor.from_pretrained(folder)
    batch = make_batch(processor, [80000])
    exact = load(folder).eval()(**batch).logits
    rounded_batch = batch.to(dtype=torch.bfloat16)
    rounded = load(folder, torch.bfloat16).eval()(**rounded_batch).logits.float()
    return (rounded - exact).norm() / exact.norm()


# ---- The adapter ----


def write_adapter(checkpoint: Path, folder: Path) -> None:
    """Writes an adapter saved by peft, and a fully trained bias of the projector."""
    torch.manual_seed(4)
    trained = r".*language_model.*_proj|.*linear_2"
    config = LoraConfig(r=2, lora_alpha=6, target_modules=trained)
    model = get_peft_model(load(checkpoint), config)
    for name, tensor in model.named_parameters():
        if "lora_B" in name:  # initialized to zeros, which would change nothing
            tensor.data.normal_(0, 0.3)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    config_path = folder / "adapter_config.json"
    saved_config = json.loads(config_path.read_text())
    saved_config["base_model_name_or_path"] = None  # a path on this machine
    config_path.write_text(json.dumps(saved_config, indent=1) + "\n")
    bias = torch.linspace(-1, 1, model.config.text_config.hidden_size)
    torch.save({"multi_modal_projector.linear_1.bias": bias}, folder / "non_lora_trainables.bin")


def adapter_goldens(checkpoint: Path, folder: Path) -> dict[str, Tensor]:
    """Logits after peft's own merge, with lora_alpha / rank and with lora_alpha / sqrt(rank)."""
    processor = AutoProcessor.from_pretrained(checkpoint)
    batch = make_batch(processor, [80000])
    goldens = {}
    for name, use_rslora in (("think", False), ("think_rslora", True)):
        model = load(checkpoint)
        others = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
        others = {f"model.{key}": tensor for key, tensor in others.items()}
        model.load_state_dict(others, strict=False)
        config = LoraConfig.from_pretrained(folder)
        config.use_rslora = use_rslora
        model = PeftModel.from_pretrained(model, folder, config=config)
        model = model.merge_and_unload().eval()
        with torch.no_grad():
            goldens[f"{name}.logits"] = model(**batch).logits[0, ::29]
    return goldens


# ---- Words ----

TEXTS = [
    "",
    " ",
    "hi",
    "Transcribe the input speech.",
    "\n\n  \n x",
    "user\n\nhi",
    "I'll they're IT'S",
    "12345 6 7.89",
    "naïve café",
    "cafe\u0301 A\u030a \u1e9b\u0323",
    "日本語のテキスト、",
    "한국어 \u1112\u1161\u11ab",
    "Ελληνικά και русский",
    "🎵🎶👩‍👩‍👧",
    "שלום \u200f עולם",
    "def f(x):\n\treturn x**2  # ok",
    "\r\n\r\n",
    "a\u00a0b\u3000c",
    "tab\t\ttab",
    "x" * 50,
    " " * 20 + "end",
    "<tool-call> < sound >",
    "...!!!???",
    "ﬁ ½ Ⅷ",
    "e\u0301\u0327",
    "\x00\x01\x7f",
    "१२३ ٤٥",
    "Ǆ ǅ ǆ",
]

AUDIO = {"type": "audio", "path": "a.wav"}


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}


CHATS = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "user", "content": [text_part("Describe."), AUDIO]}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [AUDIO, text_part("One "), text_part("two")]},
    ],
    [
        {"role": "user", "content": [text_part("What is it?"), AUDIO]},
        {"role": "assistant", "content": "rain"},
        {"role": "user", "content": [AUDIO, text_part("And this?")]},
        {"role": "assistant", "content": "wind"},
    ],
]


def template_goldens(folder: Path) -> list[dict]:
    processor = AutoProcessor.from_pretrained(folder)
    goldens = []
    for chat in CHATS:
        for prompt in (True, False):
            text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
            goldens.append({"chat": chat, "prompt": prompt, "text": text})
    return goldens


def tokenizer_goldens(folder: Path) -> dict[str, list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {text: tokenizer(text)["input_ids"] for text in TEXTS}


def main() -> None:
    write_checkpoint(DATA / "micro")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder)
        for file in (DATA / "micro").iterdir():
            shutil.copy(file, checkpoint)
        for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json"):
            shutil.copy(TINY / name, checkpoint)
        shutil.copy(TINY / "chat_template.jinja", checkpoint)

        write_adapter(checkpoint, DATA / "think")
        numbers = case_goldens(checkpoint) | adapter_goldens(checkpoint, DATA / "think")
        numbers["five_seconds.bfloat16_distance"] = bfloat16_distance(checkpoint)
        arrays = {name: tensor.numpy() for name, tensor in numbers.items()}
        np.savez_compressed(DATA / "goldens.npz", **arrays)
        words = {
            "tiny": tokenizer_goldens(checkpoint),
            "qwen": tokenizer_goldens(SHARED / "qwen"),
            "templates": template_goldens(checkpoint),
        }
    (DATA / "goldens.json").write_text(json.dumps(words, indent=1) + "\n")


if __name__ == "__main__":
    main()
