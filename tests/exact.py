"""The largest differences from transformers on any checkpoint, in float32, over the cases of signals.py.

    pip install transformers==5.23.0 librosa        # only for this
    python tests/exact.py CHECKPOINT
"""
import sys
from pathlib import Path

import torch
from transformers import AudioFlamingo3ForConditionalGeneration as Oracle
from transformers import AutoProcessor

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from af3 import AudioFlamingo3ForConditionalGeneration
from processor import AudioFlamingo3Processor
from signals import CASES, conversation, sound

oracle, model = (cls.from_pretrained(sys.argv[1], dtype=torch.float32).eval() for cls in (Oracle, AudioFlamingo3ForConditionalGeneration))
theirs, ours = (cls.from_pretrained(sys.argv[1]) for cls in (AutoProcessor, AudioFlamingo3Processor))
largest: dict[str, float] = {}


def note(name: str, a: torch.Tensor, b: torch.Tensor) -> None:
    largest[name] = max(largest.get(name, 0), float((a - b).abs().max()))


with torch.inference_mode():
    for case, side in [(case, side) for case in CASES for side in ("left", "right")]:
        chats = [conversation(sound(length, seed=7)) for length in CASES[case]]
        want = theirs.apply_chat_template(chats, tokenize=True, add_generation_prompt=True, return_dict=True, processor_kwargs={"padding_side": side})
        have = ours.apply_chat_template(chats, add_generation_prompt=True, padding_side=side, output_labels=True)
        labels = have.pop("labels")
        assert torch.equal(want["input_ids"], have["input_ids"]) and torch.equal(want["input_features_mask"], have["feature_attention_mask"])
        note("log-mel", want["input_features"], have["input_features"])
        frames = oracle.get_audio_features(want["input_features"], want["input_features_mask"]).pooler_output
        note("audio frames", frames, model.get_audio_features(have["input_features"], have["feature_attention_mask"]))
        a, b, real = oracle(**want, labels=labels), model(**have, labels=labels), have["attention_mask"].bool()
        note("logits", a.logits[real], b.logits[real])
        if side == "right" or len(chats) == 1:  # with left padding the oracle also predicts first tokens from padding
            note("loss", a.loss, b.loss)
        if side == "left":
            for options in {"max_new_tokens": 64}, {"max_new_tokens": 24, "repetition_penalty": 1.3}:
                same = torch.equal(oracle.generate(**want, do_sample=False, **options), model.generate(**have, do_sample=False, **options))
                print(f"{case}: greedy tokens {options} {'the same' if same else 'DIFFER'}", flush=True)
print(largest, f"largest frame {frames.abs().max():.2f}, logit {a.logits[real].abs().max():.2f}")
