"""Measures time and memory of a training step: LoRA of rank 16, a recording of 5 s, full width.

    python tools/train_step.py CHECKPOINT                   any checkpoint
    python tools/train_step.py --decoder-layers 4           random weights, the official widths
    python tools/train_step.py --decoder-layers 4 --gradient-checkpointing

The input is 125 audio frames and 40 other tokens; the last 20 are the answer. The first step also
allocates the optimizer's state, so the second step is timed. Prints a Markdown table.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
from af3 import AudioFlamingo3Config, AudioFlamingo3ForConditionalGeneration, Qwen2Config
from bench import peak_memory
from extras.finetune import AnswerLoss, Settings, make_trainable, save_memory, train_step
from plumbing.transformers_conventions import Batch
from processor import feature_batch
from signals import sound

AUDIO_FRAMES = 125  # 5 s
OTHER_TOKENS = 40
ANSWER_TOKENS = 20


def random_model(decoder_layers: int) -> AudioFlamingo3ForConditionalGeneration:
    """The official sizes except for the number of decoder layers, in bfloat16."""
    config = AudioFlamingo3Config(text_config=Qwen2Config(num_hidden_layers=decoder_layers))
    with torch.device("meta"):
        model = AudioFlamingo3ForConditionalGeneration(config).to(torch.bfloat16)
    model.to_empty(device="cpu").requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=0.02)
    return model


def make_batch(model: AudioFlamingo3ForConditionalGeneration) -> Batch:
    ids = torch.randint(1000, (1, OTHER_TOKENS))
    audio_ids = torch.full((1, AUDIO_FRAMES), model.config.audio_token_id)
    input_ids = torch.cat([audio_ids, ids], dim=1)
    labels = input_ids.clone()
    labels[:, :-ANSWER_TOKENS] = -100
    features, mask = feature_batch([torch.from_numpy(sound(80000))])
    batch = Batch(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), labels=labels)
    batch["input_features"] = features
    batch["feature_attention_mask"] = mask
    batch["window_index"] = torch.zeros(1, dtype=torch.long)  # not needed by Audio Flamingo 3
    return batch.to(model.device)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--decoder-layers", type=int, default=28)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    args = parser.parse_args()
    if args.checkpoint:
        model = AudioFlamingo3ForConditionalGeneration.from_pretrained(args.checkpoint)
    else:
        model = random_model(args.decoder_layers)
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    if args.gradient_checkpointing:
        save_memory(model)
    trained = make_trainable(model, Settings(rank=16))
    optimizer = torch.optim.AdamW(trained.values())
    batch = make_batch(model)
    for _ in range(2):
        start = time.perf_counter()
        loss = train_step(AnswerLoss(model), batch, optimizer, rate=1e-4)
        seconds = time.perf_counter() - start  # reading the loss has synchronized with a GPU

    factors = sum(parameter.numel() for parameter in trained.values())
    layers = model.config.text_config.num_hidden_layers
    checkpointing = "yes" if args.gradient_checkpointing else "no"
    cells = [str(layers), checkpointing, f"{factors / 1e6:.1f} M", f"{weights / 1e9:.2f} GB"]
    cells += [f"{peak_memory(model.device):.2f} GB", f"{seconds:.1f} s", f"{loss:.2f}"]
    print("| layers | gradient checkpointing | factors | weights | peak | a step | loss |")
    print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
