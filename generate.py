"""Ask Audio Flamingo 3 about a sound: the answer on stdout as it is generated, what was done on stderr.

examples:
  python generate.py speech.wav                                     transcribes, with the embedded tiny checkpoint
  python generate.py rain.mp3 "What sound is this?"                 asks; files other than WAV need ffmpeg
  python generate.py talk.flac "Summarize." --model nvidia/audio-flamingo-3-hf --max-new-tokens 200
  python generate.py song.ogg "Describe the song." --sample --temperature 0.7 --top-p 0.9 --seed 1
"""
import argparse
import codecs
import sys
import time
import warnings
from pathlib import Path

import torch

from af3 import AudioFlamingo3ForConditionalGeneration
from processor import SAMPLE_RATE, AudioFlamingo3Processor, load_audio

TINY = Path(__file__).resolve().parent / "tiny"

def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("audio", help="a sound file: WAV, or with ffmpeg mp3, flac, ogg, m4a, opus, video")
    parser.add_argument("prompt", nargs="?", help="a question or instruction; without one, the speech is transcribed")
    parser.add_argument("--model", default=TINY, help="a checkpoint directory, or a hub name in the local cache (default: tiny/)")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="stop after N tokens (default: the checkpoint's, else 512)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps (default: auto)")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, float16 (default: the checkpoint's own)")
    parser.add_argument("--sample", action="store_true", default=None, help="draw tokens at random instead of the likeliest")
    parser.add_argument("--temperature", type=float, help="above 1 bolder, below 1 safer; with --sample")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens; with --sample")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest tokens that hold P of the probability")
    parser.add_argument("--repetition-penalty", type=float, metavar="R", help="above 1, said tokens become less likely")
    parser.add_argument("--seed", type=int, help="makes --sample repeatable")
    parser.add_argument("--quiet", action="store_true", help="nothing on stderr but errors and warnings")
    return parser.parse_args()

def show_windows(model: AudioFlamingo3ForConditionalGeneration, windows: int) -> None:
    """On a long sound in a terminal, which windows the encoder is at."""
    begun = 0

    def before_encoding(_, inputs) -> None:
        nonlocal begun
        begun += len(inputs[0])
        print(f"\rencoding window {begun} of {windows}", end="\r" if begun < windows else "\r\033[K", file=sys.stderr, flush=True)
    if windows > 1 and sys.stderr.isatty():
        model.audio_tower.register_forward_pre_hook(before_encoding)

def answer(args: argparse.Namespace) -> None:
    """Prints the answer as it comes; then, unless --quiet, one line of what was heard and one of what was done."""
    prompt = args.prompt
    if prompt is not None and prompt.startswith("<|im_start|>"):
        raise ValueError("The prompt starts with <|im_start|>; say in plain words what you want to know.")
    waveform = load_audio(args.audio)
    processor = AudioFlamingo3Processor.from_pretrained(args.model)
    inputs = processor(processor.default_transcription_prompt if prompt is None else prompt, waveform)
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(args.model, args.device, args.dtype)
    inputs = inputs.to(model.device)
    windows, frames = len(inputs["input_features"]), int((inputs["input_ids"] == model.config.audio_token_id).sum())
    if not args.quiet:
        heard = min(len(waveform) / SAMPLE_RATE, processor.max_audio_len)
        print(f"heard {heard:.1f} s: {windows} window{'s' * (windows > 1)}, {frames} audio frames", file=sys.stderr)
        show_windows(model, windows)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    start, times = time.perf_counter(), []
    text = codecs.getincrementaldecoder("utf-8")(errors="replace")  # holds a character back until all its bytes are there
    try:
        for ids in model.stream(**inputs, max_new_tokens=args.max_new_tokens, do_sample=args.sample, temperature=args.temperature,
                                top_k=args.top_k, top_p=args.top_p, repetition_penalty=args.repetition_penalty):
            times.append(time.perf_counter() - start)
            print(text.decode(processor.tokenizer.token_bytes(ids, skip_special_tokens=True)), end="", flush=True)
    finally:
        print(text.decode(b"", final=True), flush=True)
    if not args.quiet:
        rate = (len(times) - 1) / max(times[-1] - times[0], 1e-9)
        print(f"said {len(times)} tokens: the first after {times[0]:.2f} s, then {rate:.1f} tokens/s", file=sys.stderr)

def main() -> int:
    """0, or 2 for bad input with one line `error: …`, or 130 when interrupted, with what was said so far kept."""
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        answer(parse_arguments())
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0

if __name__ == "__main__":
    sys.exit(main())
