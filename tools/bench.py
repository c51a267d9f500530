"""Times this project, and transformers if it is installed, and prints a Markdown table.

    python tools/bench.py tiny                                     embedded checkpoint, 5 s of audio
    python tools/bench.py CHECKPOINT --int8 --int4 --seconds 5 30  its own dtype, then int8 and int4
    python tools/bench.py CHECKPOINT --seconds 30 120 300 600 --tokens 4 --rounds 3
    pip install transformers==5.23.0 librosa     for the comparison: ours : theirs = ratio

encoder      from log-mel windows to projected audio frames
first token  from the waveform, including log-mel and encoder
tokens/s     after the first token
GB/s of      the rate at which the decoder's weights are read, and that of a loop that computes only
baseline     the decoder's matrix-vector products, which every token needs
peak         memory of this project alone, measured before transformers is imported

Times are medians over several rounds. Both sides and the loop take turns in one process, on the
same tensors, so a full-size model is in memory only once.
"""

import argparse
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
from af3 import AudioFlamingo3ForConditionalGeneration
from extras.float32_matmul import use_float32_matmul
from extras.long_prompts import use_unmasked_attention
from extras.quantize import LAYERS, quantize
from extras.short_windows import encode_short_windows_apart
from peak_memory import peak_bytes
from plumbing.devices import choose_device
from plumbing.terminal import exit_with
from processor import SAMPLE_RATE, AudioFlamingo3Processor
from signals import conversation, sound

PROMPT = "Describe the audio in detail."

COLUMNS = [
    "checkpoint",
    "decoder",
    "audio",
    "encoder, s",
    "first token, s",
    "tokens/s",
    "GB/s of baseline",
    "peak",
]


# ---- The two sides ----


class Ours:
    def __init__(self, model: AudioFlamingo3ForConditionalGeneration, checkpoint: str):
        self.model = model
        self.processor = AudioFlamingo3Processor.from_pretrained(checkpoint)

    def inputs(self, waveform: np.ndarray) -> dict:
        return self.processor(PROMPT, waveform).to(self.model.device)

    def encode(self, inputs: dict) -> torch.Tensor:
        return self.model.get_audio_features(
            inputs["input_features"], inputs["feature_attention_mask"], inputs.get("window_index")
        )

    def answer(self, inputs: dict, tokens: int, on_token: Callable[[], None]) -> None:
        for _ in self.model.stream(
            **inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=[]
        ):
            on_token()


class Theirs:
    """transformers' model over our tensors, and its own processor."""

    def __init__(self, model: AudioFlamingo3ForConditionalGeneration, checkpoint: str):
        import transformers

        transformers.logging.set_verbosity_error()
        config = transformers.AutoConfig.from_pretrained(checkpoint)
        self.is_music_flamingo = config.model_type == "musicflamingo"
        model_class = transformers.AudioFlamingo3ForConditionalGeneration
        if self.is_music_flamingo:
            model_class = transformers.MusicFlamingoForConditionalGeneration
        with torch.device("meta"):
            self.model = model_class._from_config(config, dtype=model.dtype)
        weights = {their_name(name): tensor for name, tensor in model.state_dict().items()}
        self.model.load_state_dict(weights, assign=True)
        self.model.eval()
        # The rotary frequencies are not in the checkpoint, so they are still on the meta device.
        decoder = self.model.model.language_model
        decoder.rotary_emb = type(decoder.rotary_emb)(config.text_config).to(model.device)
        if self.is_music_flamingo:
            rotary_time = self.model.model.pos_emb
            self.model.model.pos_emb = type(rotary_time)(config).to(model.device)
        self.processor = transformers.AutoProcessor.from_pretrained(checkpoint)

    def inputs(self, waveform: np.ndarray) -> dict:
        batch = self.processor.apply_chat_template(
            conversation(waveform, PROMPT),
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
        )
        return batch.to(self.model.device, self.model.dtype)

    def encode(self, inputs: dict) -> torch.Tensor:
        arguments = [inputs["input_features"], inputs["input_features_mask"]]
        if self.is_music_flamingo:
            arguments.append(inputs["input_ids"])
        return self.model.get_audio_features(*arguments)

    def answer(self, inputs: dict, tokens: int, on_token: Callable[[], None]) -> None:
        self.model.generate(
            **inputs,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            streamer=Streamer(on_token),
        )


class Streamer:
    """Calls a function for each new token, but not for the prompt, which comes first."""

    def __init__(self, on_token: Callable[[], None]):
        self.on_token = on_token

    def put(self, ids: torch.Tensor) -> None:
        if ids.ndim == 1:
            self.on_token()

    def end(self) -> None:
        pass


def their_name(name: str) -> str:
    """transformers' name for one of our tensors."""
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    return "model." + name.replace("language_model.model.", "language_model.")


# ---- Timing ----


def now(device: torch.device) -> float:
    """Returns the time after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.inference_mode()  # neither side keeps a graph
def time_side(side: Ours | Theirs, waveform: np.ndarray, tokens: int) -> dict[str, float]:
    """Returns the seconds for the encoder, the first token, and each further token."""
    device = side.model.device
    inputs = side.inputs(waveform)
    start = now(device)
    side.encode(inputs)
    encoder = now(device) - start
    del inputs  # the answer makes its own

    token_times = []
    start = now(device)
    side.answer(side.inputs(waveform), tokens, lambda: token_times.append(now(device)))
    decoding = token_times[-1] - token_times[0]
    return {
        "encoder": encoder,
        "first token": token_times[0] - start,
        "each token": decoding / (len(token_times) - 1),
    }


class Baseline:
    """Only the decoder's matrix-vector products, which every token needs."""

    def __init__(self, model: AudioFlamingo3ForConditionalGeneration):
        self.device = model.device
        self.products = []
        self.num_bytes = 0
        for module in model.language_model.modules():
            if isinstance(module, (torch.nn.Linear, *LAYERS.values())):
                x = torch.randn(1, module.in_features, dtype=model.dtype, device=model.device)
                self.products.append((module, x))
                self.num_bytes += weight_bytes(module)

    def run(self) -> None:
        for module, x in self.products:
            if isinstance(module, torch.nn.Linear):
                F.linear(x, module.weight)
            else:
                module(x)

    def seconds(self, times: int) -> float:
        start = now(self.device)
        for _ in range(times):
            self.run()
        return (now(self.device) - start) / times


def weight_bytes(module: torch.nn.Module) -> int:
    """The size of a linear layer, or of a quantized one with its scales; without the bias."""
    if isinstance(module, torch.nn.Linear):
        return module.weight.nbytes
    return sum(buffer.nbytes for buffer in module.buffers())


def peak_memory(device: torch.device) -> float:
    """In GB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return peak_bytes() / 1e9


def load_model(
    args: argparse.Namespace, bits: int | None
) -> AudioFlamingo3ForConditionalGeneration:
    load = AudioFlamingo3ForConditionalGeneration.from_pretrained
    model = load(args.checkpoint, "cpu", args.dtype)
    if bits is not None:
        quantize(model, bits)
    model = use_float32_matmul(model.to(choose_device(args.device)))
    return use_unmasked_attention(encode_short_windows_apart(model))  # as generate.py does


@torch.inference_mode()
def measure(args: argparse.Namespace, bits: int | None) -> tuple[list[str], torch.Tensor]:
    """Returns a table row for each audio length, and the logits at the end of a prompt."""
    model = load_model(args, bits)
    ours = Ours(model, args.checkpoint)
    peaks = []
    for seconds in args.seconds:  # this also warms up
        time_side(ours, make_waveform(seconds), args.tokens)
        peaks.append(peak_memory(model.device))
    sides = [ours]
    if not args.alone and bits is None:
        try:
            sides.append(Theirs(model, args.checkpoint))
        except ImportError:
            print("Without transformers: pip install transformers==5.23.0", file=sys.stderr)

    rows = []
    baseline = Baseline(model)
    for seconds, peak in zip(args.seconds, peaks):
        waveform = make_waveform(seconds)
        times = [[] for _ in sides]
        baseline_times = []
        for _ in range(args.rounds):
            for number, side in enumerate(sides):
                times[number].append(time_side(side, waveform, args.tokens))
            baseline_times.append(baseline.seconds(args.tokens - 1))
        cells = [args.checkpoint, decoder_name(model, bits), f"{seconds:g} s"]
        cells += timing_cells(times)
        each = statistics.median(round_times["each token"] for round_times in times[0])
        cells.append(bandwidth_cell(baseline.num_bytes, each, statistics.median(baseline_times)))
        cells.append(f"{peak:.2f} GB")
        rows.append("| " + " | ".join(cells) + " |")
    return rows, last_logits(ours, make_waveform(args.seconds[0]))


def make_waveform(seconds: float) -> np.ndarray:
    """Ten seconds, repeated: to compute half an hour would take more memory than the model."""
    num_samples = round(seconds * SAMPLE_RATE)
    ten_seconds = sound(min(num_samples, 10 * SAMPLE_RATE))
    return np.tile(ten_seconds, math.ceil(seconds / 10))[:num_samples]


def last_logits(ours: Ours, waveform: np.ndarray) -> torch.Tensor:
    """Returns (16, V), the logits at the last 16 positions of the prompt."""
    inputs = ours.inputs(waveform)
    inputs["attention_mask"] = inputs["attention_mask"].bool()
    states = ours.model.prefill(**inputs)
    return ours.model.language_model.lm_head(states[0, -16:]).float().cpu()


# ---- The table ----


def decoder_name(model: AudioFlamingo3ForConditionalGeneration, bits: int | None) -> str:
    if bits is not None:
        return f"int{bits}"
    return str(model.dtype).removeprefix("torch.")


def timing_cells(times: list[list[dict]]) -> list[str]:
    """Returns the cells for encoder, first token and tokens/s: medians of each side's rounds."""
    medians = []
    for rounds in times:
        names = rounds[0].keys()
        medians.append({name: statistics.median(r[name] for r in rounds) for name in names})
    return [
        compare([side["encoder"] for side in medians]),
        compare([side["first token"] for side in medians]),
        compare([1 / side["each token"] for side in medians], more_is_better=True),
    ]


def compare(values: list[float], more_is_better: bool = False) -> str:
    """Formats our value alone, or `ours : theirs = how many times better`."""
    if len(values) == 1:
        return f"{values[0]:.3g}"
    ours, theirs = values
    if more_is_better:
        ratio = ours / theirs
    else:
        ratio = theirs / ours
    return f"{ours:.3g} : {theirs:.3g} = {ratio:.2f}"


def bandwidth_cell(num_bytes: int, seconds: float, baseline_seconds: float) -> str:
    reached = num_bytes / seconds / 1e9
    baseline = num_bytes / baseline_seconds / 1e9
    return f"{reached:.1f} of {baseline:.1f} = {reached / baseline:.0%}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--seconds", type=float, nargs="+", default=[5])
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--int8", action="store_true", help="also measure the decoder in int8")
    parser.add_argument("--int4", action="store_true", help="also measure the decoder in int4")
    parser.add_argument("--alone", action="store_true", help="without transformers")
    args = parser.parse_args()
    if args.tokens < 2 or args.rounds < 1:
        parser.error("--tokens must be at least 2 and --rounds at least 1")
    if not all(0.03 <= seconds <= 1800 for seconds in args.seconds):
        parser.error("--seconds must be from 0.03 to 1800")
    return args


def main() -> None:
    args = parse_arguments()
    print("| " + " | ".join(COLUMNS) + " |")
    print("|---" * len(COLUMNS) + "|", flush=True)
    logits = {}
    for bits, is_wanted in {None: True, 8: args.int8, 4: args.int4}.items():
        if is_wanted:
            # A new process for each, so that each has its own peak memory.
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(max_workers=1, mp_context=context) as process:
                rows, logits[bits] = process.submit(measure, args, bits).result()
            print("\n".join(rows), flush=True)
    expected = logits.pop(None)
    for bits, last in logits.items():
        error = (last - expected).norm() / expected.norm()
        print(f"\nDistance of the int{bits} logits at the last 16 positions of the prompt,")
        print(f"norm of the difference over norm: {error:.2%}")


if __name__ == "__main__":
    exit_with(main)
