"""Writes tests/micro/ (a seeded random checkpoint), tests/think/ (a LoRA adapter to it) and tests/goldens.npz and .json
(what transformers and peft make of them).

    pip install transformers==5.23.0 peft librosa   # the oracles; neither the project nor its tests need them
    python tests/make_goldens.py
"""
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AudioFlamingo3Config, AudioFlamingo3ForConditionalGeneration, AutoProcessor, AutoTokenizer, Qwen2Config

from signals import CASES, conversation, sound

HERE = Path(__file__).resolve().parent
TINY = HERE.parent / "tiny"


def write_micro(folder: Path) -> None:
    ids = {token["content"]: token["id"] for token in json.loads((TINY / "tokenizer.json").read_text())["added_tokens"]}
    text = Qwen2Config(vocab_size=max(ids.values()) + 1, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
                       num_attention_heads=4, num_key_value_heads=2, rope_theta=1e6, max_position_embeddings=4096)
    audio = dict(model_type="audioflamingo3_encoder", hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                 num_attention_heads=2, num_mel_bins=128, max_source_positions=1500)
    config = AudioFlamingo3Config(text_config=text, audio_config=audio, audio_token_id=ids["<sound>"])
    config.dtype = "float32"
    config.architectures = ["AudioFlamingo3ForConditionalGeneration"]
    config.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [], "pad_token_id": ids["<|endoftext|>"]}) + "\n")
    with torch.device("meta"):
        state = AudioFlamingo3ForConditionalGeneration(config).state_dict()
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, tensor in state.items():
        name = name.replace("model.language_model.", "language_model.model.").replace("model.audio_tower", "audio_tower")
        name = name.replace("model.multi_modal", "multi_modal") if not name.startswith("lm_head") else f"language_model.{name}"
        noise = torch.randn(tensor.shape, generator=generator)
        scale = 0.1 if tensor.ndim == 1 or "positions" in name else 0.5 if "embed" in name else 1.5 / tensor[0].numel() ** 0.5
        tensors[name] = 1 + 0.2 * noise if "norm" in name and name.endswith("weight") else scale * noise
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def goldens(folder: Path) -> dict[str, np.ndarray]:
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    found = {}
    for case, lengths in CASES.items():
        chats = [conversation(sound(length)) for length in lengths]
        for side in ["left", "right"] if len(lengths) > 1 else ["left"]:
            batch = processor.apply_chat_template(chats, tokenize=True, add_generation_prompt=True, return_dict=True,
                                                  processor_kwargs={"padding_side": side})
            real = batch["attention_mask"].bool()
            labels = batch["input_ids"].masked_fill(~real | (batch["input_ids"] == processor.audio_token_id), -100)
            with torch.no_grad():
                frames = model.get_audio_features(batch["input_features"], batch["input_features_mask"]).pooler_output
                output = model(**batch, labels=labels)
            name = f"{case}.{side}"
            found |= {f"{name}.input_ids": batch["input_ids"], f"{name}.mel": batch["input_features"][:, ::8, ::37],
                      f"{name}.mel_frames": batch["input_features_mask"].sum(-1), f"{name}.frames": frames[::13],
                      f"{name}.logits": output.logits[real][::29]}
            if side == "right" or len(lengths) == 1:  # with left padding the oracle also predicts first tokens from padding
                found[f"{name}.loss"] = output.loss
            if side == "left":
                new = batch["input_ids"].shape[1]
                for key, options in {"greedy": {"max_new_tokens": 64}, "penalised": {"max_new_tokens": 24, "repetition_penalty": 1.3}}.items():
                    found[f"{name}.{key}"] = model.generate(**batch, do_sample=False, **options)[:, new:]
    rounded = AudioFlamingo3ForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).eval()
    batch = processor.apply_chat_template(conversation(sound(80000)), tokenize=True, add_generation_prompt=True, return_dict=True)
    with torch.no_grad():
        exact, near = model(**batch).logits, rounded(**batch.to(dtype=torch.bfloat16)).logits.float()
    found["five_seconds.bfloat16_distance"] = (near - exact).norm() / exact.norm()
    return {name: value.numpy() for name, value in found.items()}


def write_adapter(folder: Path) -> None:
    """think/ as peft saves it, and beside it a projector's bias that was trained as a whole."""
    torch.manual_seed(4)
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    trained = r".*language_model.*_proj|.*linear_2"
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=6, target_modules=trained))
    for name, tensor in model.named_parameters():
        if "lora_B" in name:
            tensor.data.normal_(0, 0.3)
    model.save_pretrained(HERE / "think")
    (HERE / "think" / "README.md").unlink()
    config = json.loads((HERE / "think" / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    (HERE / "think" / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
    bias = torch.linspace(-1, 1, model.config.text_config.hidden_size)
    torch.save({"multi_modal_projector.linear_1.bias": bias}, HERE / "think" / "non_lora_trainables.bin")


def think_goldens(folder: Path) -> dict[str, np.ndarray]:
    """Logits after peft's own merge, with lora_alpha / r and, as use_rslora asks, with lora_alpha / sqrt(r)."""
    processor, found = AutoProcessor.from_pretrained(folder), {}
    batch = processor.apply_chat_template(conversation(sound(80000)), tokenize=True, add_generation_prompt=True, return_dict=True)
    for name, rslora in (("think", False), ("think_rslora", True)):
        model = AudioFlamingo3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        others = torch.load(HERE / "think" / "non_lora_trainables.bin", weights_only=True)
        model.load_state_dict({f"model.{key}": tensor for key, tensor in others.items()}, strict=False)
        config = LoraConfig.from_pretrained(HERE / "think")
        config.use_rslora = rslora
        model = PeftModel.from_pretrained(model, HERE / "think", config=config).merge_and_unload().eval()
        with torch.no_grad():
            found[f"{name}.logits"] = model(**batch).logits[0, ::29].numpy()
    return found


def template_goldens(processor) -> list[dict]:
    """The oracle's text of conversations, and of the tokenizer's own files its ids of texts."""
    audio = {"type": "audio", "path": "a.wav"}
    text = lambda words: {"type": "text", "text": words}
    chats = [[{"role": "user", "content": "Hello"}],
             [{"role": "user", "content": [text("Describe."), audio]}],
             [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [audio, text("One "), text("two")]}],
             [{"role": "user", "content": [text("What is it?"), audio]}, {"role": "assistant", "content": "rain"},
              {"role": "user", "content": [audio, text("And this?")]}, {"role": "assistant", "content": "wind"}]]
    return [{"chat": chat, "prompt": prompt, "text": processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)}
            for chat in chats for prompt in (True, False)]


TEXTS = ["", " ", "hi", "Transcribe the input speech.", "\n\n  \n x", "user\n\nhi", "I'll they're IT'S", "12345 6 7.89", "naïve café",
         "cafe\u0301 A\u030a \u1e9b\u0323", "日本語のテキスト、", "한국어 \u1112\u1161\u11ab", "Ελληνικά και русский", "🎵🎶👩‍👩‍👧", "שלום \u200f עולם",
         "def f(x):\n\treturn x**2  # ok", "\r\n\r\n", "a\u00a0b\u3000c", "tab\t\ttab", "x" * 50, " " * 20 + "end", "<tool-call> < sound >",
         "...!!!???", "ﬁ ½ Ⅷ", "e\u0301\u0327", "\x00\x01\x7f", "१२३ ٤٥", "Ǆ ǅ ǆ"]


def tokenizer_goldens(folder: Path) -> dict[str, list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {text: tokenizer(text)["input_ids"] for text in TEXTS}


if __name__ == "__main__":
    write_micro(HERE / "micro")
    with tempfile.TemporaryDirectory() as folder:
        for file in [*(HERE / "micro").iterdir(), *(TINY / name for name in (
                "tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"))]:
            shutil.copy(file, folder)
        write_adapter(Path(folder))
        np.savez_compressed(HERE / "goldens.npz", **goldens(Path(folder)), **think_goldens(Path(folder)))
        words = {"tiny": tokenizer_goldens(folder), "qwen": tokenizer_goldens(HERE.parent.parent / "shared" / "qwen"),
                 "templates": template_goldens(AutoProcessor.from_pretrained(folder))}
    (HERE / "goldens.json").write_text(json.dumps(words, indent=1) + "\n")
