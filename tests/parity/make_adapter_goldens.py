"""Writes tests/data/adapter_goldens.npz: the outputs of peft and transformers for our adapters.

    pip install transformers==5.23.0 peft librosa      only for this; the tests do not need them
    python tests/parity/make_adapter_goldens.py

It saves an adapter as extras/finetune.py does, loads it with peft into transformers' model, and
records the logits, and also the names of the tensors that peft itself saves for such an adapter.
It does the same with other fields in adapter_config.json.
Then it saves tiny/ with save_pretrained, loaded from either layout, and asserts that transformers
gives the same answer with the saved checkpoint.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AudioFlamingo3ForConditionalGeneration as Oracle
from transformers import AutoProcessor

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "support"), str(TESTS.parent)]
from adapters import VARIATIONS, save_variation, with_factors
from af3 import AudioFlamingo3ForConditionalGeneration
from checkpoints import write_original
from extras.lora import save_adapter
from make_goldens import make_batch
from places import DATA, TINY
from processor import AudioFlamingo3Processor


def copy_micro(folder: Path) -> Path:
    for file in (DATA / "micro").iterdir():
        shutil.copy(file, folder)
    for file in TINY.glob("*.json"):
        if not (folder / file.name).exists():
            shutil.copy(file, folder)
    shutil.copy(TINY / "chat_template.jinja", folder)
    return folder


def adapter_goldens(checkpoint: Path, folder: Path) -> dict[str, np.ndarray]:
    save_adapter(with_factors(checkpoint), folder)
    oracle = Oracle.from_pretrained(checkpoint, dtype=torch.float32)
    model = PeftModel.from_pretrained(oracle, folder).eval()
    batch = make_batch(AutoProcessor.from_pretrained(checkpoint), [80000])
    with torch.no_grad():
        logits = model(**batch).logits[0, ::29]
    return {"logits": logits.numpy(), "names": np.array(names_of_peft(checkpoint, folder))}


def variation_goldens(checkpoint: Path, folder: Path) -> dict[str, np.ndarray]:
    """The logits of the last position, with each variation of the adapter."""
    batch = make_batch(AutoProcessor.from_pretrained(checkpoint), [80000])
    goldens = {}
    for name in VARIATIONS:
        save_variation(checkpoint, folder / name, name)
        oracle = Oracle.from_pretrained(checkpoint, dtype=torch.float32)
        model = PeftModel.from_pretrained(oracle, folder / name).eval()
        with torch.no_grad():
            goldens[name] = model(**batch).logits[0, -1].numpy()
    return goldens


def names_of_peft(checkpoint: Path, folder: Path) -> list[str]:
    """Returns the names that peft gives to the tensors of an adapter for the same layers."""
    targets = LoraConfig.from_pretrained(folder).target_modules
    oracle = Oracle.from_pretrained(checkpoint, dtype=torch.float32)
    model = get_peft_model(oracle, LoraConfig(r=2, target_modules=targets))
    # By default peft adds a copy of the whole lm_head if it has factors.
    model.save_pretrained(folder / "of_peft", save_embedding_layers=False)
    return sorted(load_file(folder / "of_peft" / "adapter_model.safetensors"))


def assert_same_answer(checkpoint: Path, folder: Path) -> None:
    """Asserts that transformers, with a saved checkpoint, gives the same answer as we do."""
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(checkpoint, "cpu")
    processor = AudioFlamingo3Processor.from_pretrained(checkpoint)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    content = [
        {"type": "text", "text": "Transcribe the input speech."},
        {"type": "audio", "path": str(TINY / "samples" / "digits.wav")},
    ]
    chat = [{"role": "user", "content": content}]
    batch = processor.apply_chat_template(chat, add_generation_prompt=True)
    expected = model.generate(**batch)
    oracle = Oracle.from_pretrained(folder)
    oracle_processor = AutoProcessor.from_pretrained(folder)
    options = {"tokenize": True, "add_generation_prompt": True, "return_dict": True}
    oracle_batch = oracle_processor.apply_chat_template(chat, **options)
    assert torch.equal(oracle.generate(**oracle_batch), expected)
    new_ids = expected[0, batch["input_ids"].shape[1] :]
    print(f"{folder.name}: transformers gives {oracle_processor.decode(new_ids)!r} too")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "micro").mkdir()
        micro = copy_micro(folder / "micro")
        goldens = adapter_goldens(micro, folder / "adapter")
        goldens |= variation_goldens(micro, folder)
        np.savez_compressed(DATA / "adapter_goldens.npz", **goldens)
        write_original(TINY, folder / "original")
        assert_same_answer(TINY, folder / "from_hub_layout")
        assert_same_answer(folder / "original", folder / "from_original_layout")


if __name__ == "__main__":
    main()
