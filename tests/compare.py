"""Times this project beside transformers on one checkpoint and the same sound: interleaved, medians, ratios.

    pip install transformers==5.23.0 librosa        # only for this
    python tests/compare.py tiny --seconds 5 --tokens 20 [--dtype float32] [--rounds 9]
    python tests/compare.py FULL --seconds 5 --only ours       # a full-size model leaves no room for a second one:
    python tests/compare.py FULL --seconds 5 --only theirs     # one process each
"""
import argparse
import resource
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from signals import conversation, sound


def ours(args: argparse.Namespace) -> dict:
    from af3 import AudioFlamingo3ForConditionalGeneration
    from processor import AudioFlamingo3Processor
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(args.model, dtype=args.dtype)
    processor = AudioFlamingo3Processor.from_pretrained(args.model)
    inputs = lambda: processor.apply_chat_template(conversation(args.sound), add_generation_prompt=True)
    batch = inputs()
    return {"encoder": lambda: model.get_audio_features(batch["input_features"], batch["feature_attention_mask"]),
            "answer": lambda new: model.generate(**inputs(), max_new_tokens=new, eos_token_id=[])}


def theirs(args: argparse.Namespace) -> dict:
    from transformers import AudioFlamingo3ForConditionalGeneration, AutoProcessor
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(args.model, dtype=args.dtype).eval()
    processor = AutoProcessor.from_pretrained(args.model)
    inputs = lambda: processor.apply_chat_template(conversation(args.sound), tokenize=True, add_generation_prompt=True,
                                                   return_dict=True).to(dtype=model.dtype)
    batch = inputs()
    return {"encoder": lambda: model.get_audio_features(batch["input_features"], batch["input_features_mask"]),
            "answer": lambda new: model.generate(**inputs(), max_new_tokens=new, min_new_tokens=new, do_sample=False)}


def seconds(call, *arguments) -> float:
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", choices=["ours", "theirs"])
    args = parser.parse_args()
    args.sound = sound(round(args.seconds * 16000))
    sides, times = {}, {}
    for side in [ours, theirs] if args.only is None else [globals()[args.only]]:
        load = time.perf_counter()
        sides[side.__name__] = side(args)
        print(f"{side.__name__}: loaded in {time.perf_counter() - load:.2f} s", flush=True)
    with torch.inference_mode():
        for _ in range(args.rounds + 1):  # the first one warms up
            for name, calls in sides.items():
                row = (seconds(calls["encoder"]), seconds(calls["answer"], 1), seconds(calls["answer"], args.tokens))
                times.setdefault(name, []).append((*row, (row[2] - row[1]) / (args.tokens - 1)))
    medians = {name: [statistics.median(column) for column in zip(*rows[1:])] for name, rows in times.items()}
    for name, row in medians.items():
        print(f"{name:7s} encoder {row[0]:.4f} s   first token {row[1]:.4f} s   {args.tokens} tokens {row[2]:.4f} s   each {1000 * row[3]:.2f} ms")
    if len(medians) == 2:
        ratios = [b / a for a, b in zip(medians["ours"], medians["theirs"])]
        print("ratio   encoder {:.2f}   first token {:.2f}   answer {:.2f}   each token {:.2f}".format(*ratios))
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
