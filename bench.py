"""Times this project, beside transformers where that is installed, and prints one Markdown table.

    python bench.py tiny                                        the embedded checkpoint, 5 s of sound, 20 tokens
    python bench.py CHECKPOINT --int8 --seconds 5 30            bfloat16, then int8, each in a process of its own
    python bench.py CHECKPOINT --seconds 30 120 300 600 --tokens 4 --rounds 3
    pip install transformers==5.23.0 librosa                    only to see its figures: ours : theirs = ratio

encoder: windows of log-mel to projected audio frames. first token: from the waveform, log-mel and encoder included.
tokens/s: of those that follow. bare: a loop over nothing but the decoder's matrix-vector products, which every token needs;
its bytes a second are this machine's limit, and what an answer reaches of them is the last figure of that column.
All are medians of rounds in which both sides and the loop take turns in one process, on the same weights in memory: theirs
are ours, so a full-size model fits once. The peak is this project's alone, taken before transformers is imported.
"""
import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from ways import Int8Linear

from af3 import AudioFlamingo3ForConditionalGeneration
from processor import SAMPLE_RATE, AudioFlamingo3Processor
from tests.signals import conversation, sound

PROMPT = "Describe the audio in detail."


class Ours:
    def __init__(self, model: AudioFlamingo3ForConditionalGeneration, checkpoint: str):
        self.model, self.processor = model, AudioFlamingo3Processor.from_pretrained(checkpoint)

    def inputs(self, waveform: np.ndarray) -> dict:
        return self.processor(PROMPT, waveform).to(self.model.device)

    def encode(self, inputs: dict) -> torch.Tensor:
        return self.model.get_audio_features(inputs["input_features"], inputs["feature_attention_mask"])

    def answer(self, inputs: dict, tokens: int, said: Callable[[], None]) -> None:
        for _ in self.model.stream(**inputs, max_new_tokens=tokens, eos_token_id=[]):
            said()


class Theirs:
    """transformers' model over our tensors, and its own processor."""

    def __init__(self, model: AudioFlamingo3ForConditionalGeneration, checkpoint: str):
        import transformers
        transformers.logging.set_verbosity_error()
        config = transformers.AutoConfig.from_pretrained(checkpoint)
        with torch.device("meta"):
            self.model = transformers.AudioFlamingo3ForConditionalGeneration._from_config(config, dtype=model.dtype).eval()
        weights = {"model." + name: tensor for name, tensor in model.state_dict().items()}
        moved = {"model.language_model.model.": "model.language_model.", "model.language_model.lm_head.": "lm_head."}
        for old, new in moved.items():
            weights = {name.replace(old, new): tensor for name, tensor in weights.items()}
        self.model.load_state_dict(weights, assign=True)
        decoder = self.model.model.language_model  # its rotary frequencies are in no checkpoint
        decoder.rotary_emb = type(decoder.rotary_emb)(config.text_config).to(model.device)
        self.processor = transformers.AutoProcessor.from_pretrained(checkpoint)

    def inputs(self, waveform: np.ndarray) -> dict:
        return self.processor.apply_chat_template(conversation(waveform, PROMPT), tokenize=True, return_dict=True,
                                                  add_generation_prompt=True).to(self.model.device, self.model.dtype)

    def encode(self, inputs: dict) -> torch.Tensor:
        return self.model.get_audio_features(inputs["input_features"], inputs["input_features_mask"])

    def answer(self, inputs: dict, tokens: int, said: Callable[[], None]) -> None:
        streamer = type("Streamer", (), {"put": lambda self, ids: said() if ids.ndim == 1 else None, "end": lambda self: None})
        self.model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, streamer=streamer())


def finish(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def time_side(side: Ours | Theirs, waveform: np.ndarray, tokens: int) -> tuple[float, float, float]:
    """Seconds of the encoder, to the first token, and of each further token."""
    device, inputs = side.model.device, side.inputs(waveform)
    start = finish(device)
    side.encode(inputs)
    encoder, said = finish(device) - start, []
    start = finish(device)
    side.answer(side.inputs(waveform), tokens, lambda: said.append(finish(device)))
    return encoder, said[0] - start, (said[-1] - said[0]) / (len(said) - 1)


def bare_loop(model: AudioFlamingo3ForConditionalGeneration) -> tuple[Callable[[], None], int]:
    """A call of the decoder's matrix-vector products and nothing else, and the bytes of their matrices."""
    products = [m for m in model.language_model.modules() if isinstance(m, torch.nn.Linear | Int8Linear)]
    inputs = [torch.randn(1, m.weight.shape[1], dtype=model.dtype, device=model.device) for m in products]

    def call() -> None:
        for module, x in zip(products, inputs):
            module(x) if isinstance(module, Int8Linear) else F.linear(x, module.weight)
    return call, sum(m.weight.numel() * m.weight.element_size() for m in products)


@torch.inference_mode()
def measure(args: argparse.Namespace, int8: bool) -> tuple[list[str], torch.Tensor]:
    """The table's rows of one kind of weights, one for each length of sound, and the logits after the last prompt."""
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(args.checkpoint, args.device, args.dtype, int8)
    sides, peaks = [Ours(model, args.checkpoint)], []
    bare, size = bare_loop(model)
    for seconds in args.seconds:  # a first time without company, which also warms up
        time_side(sides[0], sound(round(seconds * SAMPLE_RATE)), args.tokens)
        peaks.append(torch.cuda.max_memory_allocated() / 1e9 if model.device.type == "cuda"
                     else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)
    if not args.alone and not int8:
        try:
            sides.append(Theirs(model, args.checkpoint))
        except ImportError:
            pass
    rows = []
    for seconds, peak in zip(args.seconds, peaks):
        rounds, loops = [[] for _ in sides], []
        for _ in range(args.rounds):
            for side, times in zip(sides, rounds):
                times.append(time_side(side, sound(round(seconds * SAMPLE_RATE)), args.tokens))
            start = finish(model.device)
            for _ in range(args.tokens - 1):
                bare()
            loops.append((finish(model.device) - start) / (args.tokens - 1))
        encoder, first, each = zip(*([statistics.median(column) for column in zip(*times)] for times in rounds))
        loop = statistics.median(loops)
        cells = [args.checkpoint, "int8" if int8 else str(model.dtype)[6:], f"{seconds:g} s", compare(encoder), compare(first),
                 compare([1 / token for token in each], more_is_better=True),
                 f"{size / each[0] / 1e9:.1f} of {size / loop / 1e9:.1f} = {loop / each[0]:.0%}", f"{peak:.2f} GB"]
        rows.append("| " + " | ".join(cells) + " |")
    x, real, _ = model.prefill(**sides[0].inputs(sound(round(args.seconds[0] * SAMPLE_RATE))))
    return rows, model.language_model.lm_head(x[0, real[0]][-16:]).float().cpu()


def compare(values: list[float], more_is_better: bool = False) -> str:
    """Ours, and where transformers took part `ours : theirs = how many times better`."""
    texts = [f"{value:.3g}" for value in values]
    if len(values) == 1:
        return texts[0]
    ratio = values[0] / values[1] if more_is_better else values[1] / values[0]
    return f"{texts[0]} : {texts[1]} = {ratio:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--seconds", type=float, nargs="+", default=[5])
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--int8", action="store_true", help="a second time with the decoder in int8")
    parser.add_argument("--alone", action="store_true", help="without transformers")
    args = parser.parse_args()
    if args.tokens < 2 or args.rounds < 1 or not all(0.03 <= seconds <= 600 for seconds in args.seconds):
        parser.error("--tokens of 2 or more, --rounds of 1 or more and --seconds from 0.03 to 600 are expected")
    print("| checkpoint | decoder | sound | encoder, s | first token, s | tokens/s | GB/s of bare | peak |\n" + "|---" * 8 + "|")
    logits = []
    for int8 in [False, True][:1 + args.int8]:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            rows, last = process.submit(measure, args, int8).result()
        print(*rows, sep="\n", flush=True)
        logits.append(last)
    if args.int8:
        error = (logits[1] - logits[0]).norm() / logits[0].norm()
        print(f"\nint8 logits, the prompt's last 16 positions: {error:.2%} from the others (norm of the difference over norm)")


if __name__ == "__main__":
    sys.exit(main())
