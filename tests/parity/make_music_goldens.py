"""Records what transformers computes for Music Flamingo and Audio Flamingo Next.

    pip install transformers==5.23.0 peft librosa      only for this; the tests do not need them
    python tests/parity/make_music_goldens.py

The checkpoints are made from tests/data/micro/ by `checkpoints.write_music_flamingo`; the
values go to tests/data/music_goldens.npz.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoProcessor, MusicFlamingoForConditionalGeneration

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "support")]
from checkpoints import write_music_flamingo
from places import DATA, TINY
from signals import CHAT, MUSIC_CASES, conversation, sound


def write_checkpoint(folder: Path, family: str) -> Path:
    micro = folder / "micro"
    if not micro.exists():
        shutil.copytree(DATA / "micro", micro)
        for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json"):
            shutil.copy(TINY / name, micro)
    write_music_flamingo(micro, TINY / "chat_template.jinja", folder / family, family)
    return folder / family


def load(checkpoint: Path, dtype: torch.dtype = torch.float32):
    return MusicFlamingoForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype).eval()


def make_batch(processor, lengths: list[int], padding_side: str):
    return processor.apply_chat_template(
        [conversation(sound(length)) for length in lengths],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        processor_kwargs={"padding_side": padding_side, "output_labels": True},
    )


@torch.no_grad()
def compute_goldens(checkpoint: Path) -> dict[str, Tensor]:
    model = load(checkpoint)
    processor = AutoProcessor.from_pretrained(checkpoint)
    goldens = {}
    for case, lengths in MUSIC_CASES.items():
        for side in ("left", "right"):
            batch = make_batch(processor, lengths, side)
            labels = batch.pop("labels")
            name = f"{case}.{side}"
            goldens[f"{name}.input_ids"] = batch["input_ids"]
            goldens[f"{name}.labels"] = labels
            frames = model.get_audio_features(
                batch["input_features"], batch["input_features_mask"], batch["input_ids"]
            )
            goldens[f"{name}.frames"] = frames.pooler_output[::59]
            output = model(**batch, labels=labels)
            goldens[f"{name}.logits"] = output.logits[batch["attention_mask"].bool()][::211]
            if side == "right":  # with left padding, its loss includes predictions from padding
                goldens[f"{name}.loss"] = output.loss
            if side == "left":
                tokens = batch["input_ids"].shape[1]
                options = {"do_sample": False, "max_new_tokens": 64}
                goldens[f"{name}.greedy"] = model.generate(**batch, **options)[:, tokens:]
                options = {"do_sample": False, "max_new_tokens": 24, "repetition_penalty": 1.3}
                goldens[f"{name}.penalised"] = model.generate(**batch, **options)[:, tokens:]

    batch = make_batch(processor, MUSIC_CASES["two_windows"], "left")
    del batch["labels"]
    exact = model(**batch).logits
    rounded = load(checkpoint, torch.bfloat16)(**batch.to(dtype=torch.bfloat16)).logits.float()
    goldens["bfloat16_distance"] = (rounded - exact).norm() / exact.norm()
    return goldens


def main() -> None:
    arrays = {}
    with tempfile.TemporaryDirectory() as folder:
        for family in ("music", "next"):
            checkpoint = write_checkpoint(Path(folder), family)
            for name, tensor in compute_goldens(checkpoint).items():
                arrays[f"{family}.{name}"] = tensor.numpy()
            processor = AutoProcessor.from_pretrained(checkpoint)
            text = processor.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
            arrays[f"{family}.template"] = np.array(text)
    np.savez_compressed(DATA / "music_goldens.npz", **arrays)


if __name__ == "__main__":
    main()
