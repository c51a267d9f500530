"""Ask Audio Flamingo 3 about a recording: the answer goes to stdout as it is generated.

examples:
  python generate.py speech.wav                       transcribes, with the small model in tiny/
  python generate.py rain.mp3 "What sound is this?"   files other than WAV need ffmpeg
  python generate.py talk.flac "Summarize." --model nvidia/audio-flamingo-3-hf --int8
  python generate.py --chat talk.flac                 a conversation
  python generate.py a.wav recordings/ "Who speaks?"  an answer for each, as JSON lines
"""

import argparse
import dataclasses
import os
import sys
from functools import partial
from pathlib import Path

from plumbing import terminal

if __name__ == "__main__":
    # Before the long imports, in which Ctrl-C would leave with a traceback.
    terminal.exit_on_interrupt()

import torch

from af3 import (
    AudioFlamingo3ForConditionalGeneration,
    GenerationConfig,
    choose_device,
    choose_dtype,
)
from plumbing.audio_file import AUDIO_SUFFIXES, stdin_as_file
from plumbing.words import STDIN, split_words
from processor import AudioFlamingo3Processor, check_plain_prompt

TINY = Path(__file__).resolve().parent / "tiny"

# Those help texts that are longer than a line.
WORDS_HELP = """recordings (WAV, or with ffmpeg mp3, flac, ogg, m4a, opus, video), folders of them,
and the prompt: a last word that is no file; without one, speech is transcribed"""
THINK_HELP = """merge the AF-Think adapter in the model's directory; end the prompt with: Please
think and reason about the input audio before you respond."""
TOP_P_HELP = "with --sample: draw from the fewest tokens that hold P of the probability"
PENALTY_HELP = "above 1: tokens in the prompt and in the answer so far become less likely"
EXPLAIN_HELP = "show the way through the model as a table and a picture, then the answer"
PROMPTS_HELP = """read JSON lines, or an array, with "audio", "prompt", perhaps "choices", and any
other fields, which are kept; - is standard input"""
OUTPUT_HELP = """write the JSON lines there; given again, go on: ask what has no answer yet,
and again what failed"""
FIELDS_HELP = "other names of two fields: audio=NAME,prompt=NAME"


SHORTER_HINT = "shorten the audio or lower --max-new-tokens"  # where memory runs out


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = refuse
    add = parser.add_argument
    flag = partial(parser.add_argument, action="store_true")
    add("words", nargs="*", metavar="audio ... prompt", help=WORDS_HELP)
    add("--model", default=TINY, help="a directory or cached hub name (default: tiny/)")
    add("--device", default="auto", help="cpu, cuda or mps (default: the best available)")
    add("--dtype", default="auto", help="float32, bfloat16 or float16 (default: the checkpoint's)")
    flag("--int8", help="hold the decoder in int8: half the memory, and faster on a CPU if large")
    flag("--think", help=THINK_HELP)
    add("--max-new-tokens", type=int, metavar="N", help="stop after N tokens (default: 512)")
    flag("--sample", dest="do_sample", help="draw tokens at random, not always the likeliest")
    add("--temperature", type=float, metavar="T", help="with --sample: above 1 is more random")
    add("--top-k", type=int, metavar="K", help="with --sample: draw from the K likeliest tokens")
    add("--top-p", type=float, metavar="P", help=TOP_P_HELP)
    add("--seed", type=int, help="makes --sample repeatable")
    add("--repetition-penalty", type=float, metavar="R", help=PENALTY_HELP)
    flag("--quiet", help="print nothing on stderr but errors and warnings")

    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--chat", action="store_true", help="hold a conversation in the terminal")
    mode.add_argument("--explain", action="store_true", help=EXPLAIN_HELP)
    mode.add_argument("--prompts", metavar="FILE", help=PROMPTS_HELP)
    add("--fields", metavar="MAP", help=FIELDS_HELP)
    add("--batch-size", type=int, metavar="N", help="answer N recordings at a time (default: 8)")
    add("--output", metavar="FILE", help=OUTPUT_HELP)
    add("--resume", metavar="FILE", help="leave out what an earlier run, `>> FILE`, has answered")
    return parser


def refuse(message: str) -> None:
    """Replaces argparse's usage message of several lines."""
    raise ValueError(f"{message}; see --help")


def main() -> int:
    """The exit status: 0, or 2 for bad input or too little memory, with one line `error: ...`.

    1 if some of many recordings have no answer. Ctrl-C leaves with 130 and keeps what has been
    printed.
    """
    terminal.prepare_streams()
    try:
        return run(make_parser().parse_intermixed_args())
    except BrokenPipeError:  # the reader has enough, as in `| head -1`
        return 0
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        terminal.print_error(error)
        return 2


def run(args: argparse.Namespace) -> int:
    """Does what the command line asks for; the exit status."""
    may_be_prompt = bool(args.prompts or args.chat)
    recordings, prompt = split_words(args.words, AUDIO_SUFFIXES, may_be_prompt)
    if not (recordings or args.chat or args.prompts):
        refuse("the following arguments are required: audio")
    if prompt is None and not args.chat:
        prompt = AudioFlamingo3Processor.default_transcription_prompt
    if prompt is not None:
        check_plain_prompt(prompt)
    options = generation_options(args)
    if STDIN not in recordings:
        return answer(args, recordings, prompt, options)
    if len(recordings) > 1 or args.chat or args.prompts:
        raise ValueError(
            "-, a recording on standard input, is answered only if it is the only one."
        )
    with stdin_as_file() as path:
        return answer(args, [path], prompt, options)


def answer(args: argparse.Namespace, recordings: list, prompt: str | None, options: dict) -> int:
    """Answers in the way that the options ask for; the exit status."""
    if args.chat:
        from extras.chat import TerminalChat

        processor = AudioFlamingo3Processor.from_pretrained(args.model)
        waveforms = [processor.to_waveform(recording) for recording in recordings]
        chat = TerminalChat(processor, load_model(args), waveforms, options, args.quiet)
        chat.run(prompt)
    elif args.explain:
        from extras.explain import explain

        if len(recordings) != 1 or os.path.isdir(recordings[0]):
            raise ValueError("--explain takes one sound file.")
        processor = AudioFlamingo3Processor.from_pretrained(args.model)
        explain(processor, load_model(args), recordings[0], prompt, options)
    elif wants_json_lines(args, recordings):
        return answer_many(args, recordings, prompt, options)
    else:
        answer_one(args, recordings[0], prompt, options)
    return 0


def wants_json_lines(args: argparse.Namespace, recordings: list[str]) -> bool:
    """Whether there is more than one recording, or an option that is for many."""
    if args.prompts or args.resume or args.output or args.batch_size is not None:
        return True
    return len(recordings) > 1 or os.path.isdir(recordings[0])


def generation_options(args: argparse.Namespace) -> dict:
    """The options of `generate` that were given; None where the checkpoint decides."""
    if args.seed is not None:
        torch.manual_seed(args.seed % 2**64)
    options = {}
    for option in dataclasses.fields(GenerationConfig):
        if getattr(args, option.name, None) is not None:
            options[option.name] = getattr(args, option.name)
    if not args.do_sample:
        del options["do_sample"]  # then the checkpoint decides
        check_no_sampling_options(args)
    GenerationConfig(**options)  # refuses a value out of range before the model is loaded
    return options


def check_no_sampling_options(args: argparse.Namespace) -> None:
    for name in ("temperature", "top_k", "top_p", "seed"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} has no effect without --sample.")


def load_model(args: argparse.Namespace) -> AudioFlamingo3ForConditionalGeneration:
    """The model, with the adapter merged and the decoder quantised where that was asked for."""
    hint = "use a smaller --dtype" if args.int8 else "use --int8, or a smaller --dtype"
    with terminal.memory_hint(hint):
        model = load_changed_model(args)
    use_one_thread_if_small(model)
    return model


def use_one_thread_if_small(model: AudioFlamingo3ForConditionalGeneration) -> None:
    """Threads of a small model mostly wait for each other, and on a busy machine much longer.

    An answer of tiny/ takes as long on one thread as on two, but with two busy neighbours a third.
    """
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    if num_parameters < 20_000_000 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def load_changed_model(args: argparse.Namespace) -> AudioFlamingo3ForConditionalGeneration:
    choose_dtype(args.dtype, torch.float32)  # refuses an unknown one before the model is loaded
    if not (args.think or args.int8):
        return AudioFlamingo3ForConditionalGeneration.from_pretrained(
            args.model, args.device, args.dtype
        )
    # Weights are changed on the CPU, one layer at a time, before they move to the device.
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(args.model, "cpu")
    if args.think:
        from extras.lora import find_think_adapter, merge_adapter

        merge_adapter(model, find_think_adapter(args.model))
    model.to(choose_dtype(args.dtype, model.dtype))
    if args.int8:
        from extras.quantize import quantize

        quantize(model)
    return model.to(choose_device(args.device))


def answer_one(args: argparse.Namespace, recording: str, prompt: str, options: dict) -> None:
    processor = AudioFlamingo3Processor.from_pretrained(args.model)
    reading = terminal.show_waiting(f"reading {recording}", args.quiet)
    with reading, terminal.memory_hint(SHORTER_HINT):
        inputs = processor.apply_transcription_request(recording, prompt)
    model = load_model(args)
    timer = terminal.StepTimer()
    with terminal.memory_hint(SHORTER_HINT):
        steps = timer.watch(model.stream(**inputs.to(model.device), **options))
        terminal.print_as_it_comes(processor.stream_text(steps))
    if not args.quiet:
        print(processor.describe_audio(inputs), file=sys.stderr)
        print(timer.summary(), file=sys.stderr)


def answer_many(args: argparse.Namespace, recordings: list, prompt: str, options: dict) -> int:
    """Prints a JSON line for each recording; `extras/batch.py` says more. The exit status."""
    from extras import batch

    terminal.exit_on_interrupt(end_line=False)  # only whole lines have been printed
    batch_size = 8 if args.batch_size is None else args.batch_size
    if batch_size < 1:
        raise ValueError(f"--batch-size is {batch_size}; at least 1 is expected.")
    processor = AudioFlamingo3Processor.from_pretrained(args.model)
    fields = parse_fields(args.fields)
    all_jobs = batch.read_jobs(args.prompts, recordings, prompt, fields)
    jobs = all_jobs
    if args.resume and os.path.exists(args.resume):
        jobs = batch.leave_out_answered(all_jobs, args.resume)
        batch.end_cut_line(args.resume)
    output = sys.stdout
    if args.output:
        output = batch.open_output(args.output, all_jobs)
        jobs = batch.leave_out_answered(jobs, args.output)
    model = load_model(args) if jobs else None
    progress = terminal.Progress(len(jobs), args.quiet)
    for job in batch.answer_jobs(jobs, processor, model, batch_size, progress, **options):
        print(batch.as_json_line(job, output.encoding), file=output, flush=True)
    answered = sum("response" in job for job in jobs)
    if not args.quiet:
        before = len(all_jobs) - len(jobs)
        earlier = f" (and {before} before)" if before else ""
        seconds = progress.seconds()
        print(f"answered {answered} of {len(jobs)}{earlier} in {seconds:.1f} s", file=sys.stderr)
    return 0 if answered == len(jobs) else 1


def parse_fields(text: str | None) -> dict[str, str]:
    """{"audio": ..., "prompt": ...} of "audio=NAME,prompt=NAME", either of which may be absent."""
    names = {}
    for pair in (text or "").split(","):
        own, _, name = pair.partition("=")
        if pair and (own not in ("audio", "prompt") or not name):
            refuse(f"--fields is {text!r}; audio=NAME,prompt=NAME is expected")
        if pair:
            names[own] = name
    return names


if __name__ == "__main__":
    os._exit(main())  # sys.exit would try again to write what stdout has refused
