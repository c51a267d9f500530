"""Ask Audio Flamingo 3 about a sound: the answer goes to stdout as it is generated, what was done to stderr.
examples:
  python generate.py speech.wav                       transcribes, with the embedded checkpoint tiny/
  python generate.py rain.mp3 "What sound is this?"   files other than WAV need ffmpeg
  python generate.py talk.flac "Summarize." --model nvidia/audio-flamingo-3-hf --int8
  python generate.py --chat talk.flac                 a conversation
  python generate.py a.wav recordings/ "Who speaks?"  an answer for each, as JSON lines
"""
import argparse
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":  # before the long imports, in which a KeyboardInterrupt is a traceback or lost
    signal.signal(signal.SIGINT, lambda *_: os._exit(os.write(1, b"\n") and 130))

import torch

from af3 import AudioFlamingo3ForConditionalGeneration, GenerationConfig
from load_weights import load_model
from processor import AudioFlamingo3Processor

VISIBLE = {c: f"\\x{c:02x}" for c in (*range(9), *range(11, 32), *range(127, 160))}  # shown, not sent to a terminal

def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     add_help=False, allow_abbrev=False)
    add = parser.add_argument
    add("audio", nargs="?", help="a sound file: WAV, or with ffmpeg mp3, flac, ogg, m4a, opus, video")
    add("prompt", nargs="?", help="a question or instruction; without one the speech is transcribed")
    add("--model", default=Path(__file__).resolve().parent / "tiny", help="a directory or cached hub name (default: tiny/)")
    add("--max-new-tokens", type=int, metavar="N", help="stop after N tokens (default: the checkpoint's, else 512)")
    add("--device", default="auto", help="cpu, cuda or mps (default: the best there is)")
    add("--dtype", default="auto", help="float32, bfloat16 or float16 (default: the checkpoint's own)")
    add("--think", action="store_true", help="with the AF-Think adapter that lies in the model's directory; the prompt should "
        "end in: Please think and reason about the input audio before you respond.")
    add("--int8", action="store_true", help="the decoder in int8: half the memory, and on a CPU twice as fast if large")
    add("--sample", dest="do_sample", action="store_true", default=None, help="draw tokens at random, not the likeliest")
    add("--temperature", type=float, metavar="T", help="with --sample: above 1 bolder, below 1 safer")
    add("--top-k", type=int, metavar="K", help="with --sample: draw from the K likeliest tokens")
    add("--top-p", type=float, metavar="P", help="with --sample: draw from the fewest tokens that hold P of the probability")
    add("--repetition-penalty", type=float, metavar="R", help="above 1, what was said becomes less likely")
    add("--seed", type=int, help="makes --sample repeatable")
    add("--quiet", action="store_true", help="nothing on stderr but errors and warnings")
    def refuse(message: str) -> None:  # instead of argparse's usage over several lines
        raise ValueError(f"{message}; see --help")
    parser.error = refuse
    return parser

def one_line(message: object) -> str:
    return " ".join(str(message).split()).translate(VISIBLE)

def plain(prompt: str | None) -> str | None:
    if (prompt or "").startswith("<|im_start|>"):  # which the processor would take for a finished template
        raise ValueError("The prompt starts with <|im_start|>; ask in plain words.")
    return prompt

def model_and_options(args: argparse.Namespace) -> tuple[AudioFlamingo3ForConditionalGeneration, dict]:
    if args.seed is not None:
        torch.manual_seed(args.seed % 2**64)
    options = {name: getattr(args, name) for name in GenerationConfig.__dataclass_fields__ if name in args}
    GenerationConfig(**options)  # what is out of range is refused before the model is loaded
    return load_model(args.model, args.device, args.dtype, args.int8, args.think), options

def say(processor: AudioFlamingo3Processor, steps: Iterator[torch.Tensor], heard: str | None) -> None:
    """Prints an answer as its steps come; then on stderr `heard` and how fast it was said, or, with None, nothing."""
    start, times = time.perf_counter(), []
    # each step is timed on its way to the text, which may come later: a character waits for its last byte
    for text in processor.stream_text(times.append(time.perf_counter() - start) or ids for ids in steps):
        print(text.translate(VISIBLE) if sys.stdout.isatty() else text, end="", flush=True)
    print(flush=True)
    if heard is not None:
        rate = f", then {(len(times) - 1) / (times[-1] - times[0]):.1f} tokens/s" if len(times) > 1 else ""
        print(f"{heard}said {len(times)} tokens: the first after {times[0]:.2f} s{rate}", file=sys.stderr)

def answer(args: argparse.Namespace) -> None:
    processor = AudioFlamingo3Processor.from_pretrained(args.model)
    inputs = processor.apply_transcription_request(args.audio, plain(args.prompt))
    mask, frames = inputs["feature_attention_mask"], int((inputs["input_ids"] == processor.audio_token_id).sum())
    heard = f"heard {int(mask.sum()) / 100:.1f} s: {len(mask)} window{'s' * (len(mask) > 1)}, {frames} audio frames\n"
    model, options = model_and_options(args)
    say(processor, model.stream(**inputs.to(model.device), **options), None if args.quiet else heard)

def main() -> int:
    """0; 2 for bad input or too little memory, with one line `error: …`. Ctrl-C leaves with 130, what was said stays."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # None where closed
    sys.stdout.reconfigure(errors="backslashreplace")  # characters that its encoding lacks
    warnings.showwarning = lambda message, *_: print(f"warning: {one_line(message)}", file=sys.stderr)
    try:
        args, others = make_parser().parse_known_intermixed_args()  # a prompt may come after an option
        if others or args.audio is None or os.path.isdir(args.audio) or os.path.exists(args.prompt or ""):
            import ways  # whatever is not one sound and one answer
            ways.main()
        else:
            answer(args)
    except BrokenPipeError:  # a reader that has enough, `| head -1`, is no error
        pass
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        hint = "shorten the audio, lower --max-new-tokens or use --int8: " if "memory" in repr(error).lower() else ""
        print(f"error: {hint}{one_line(error)}", file=sys.stderr)
        return 2
    return 0

if __name__ == "__main__":
    os._exit(main())  # not sys.exit: what stdout has refused is not tried again
