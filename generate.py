"""Ask Audio Flamingo 3 about a recording: the answer goes to stdout as it is generated.

examples:
  python generate.py speech.wav                       transcribes, with the small model in tiny/
  python generate.py rain.mp3 "What sound is this?"   files other than WAV need ffmpeg
  python generate.py talk.flac "Summarize." --model nvidia/audio-flamingo-3-hf --int8 --greedy
  python generate.py --chat talk.flac                 a conversation
  python generate.py a.wav recordings/ "Who speaks?"  an answer for each, as JSON lines
  torchrun --nproc-per-node 2 generate.py recordings/ "Who speaks?"  shared by two processes
"""

import argparse
from pathlib import Path

from plumbing import terminal

if __name__ == "__main__":
    terminal.prepare_for_slow_imports()

from extras import command_line
from processor import AudioFlamingo3Processor

TINY = Path(__file__).resolve().parent / "tiny"


@command_line.exit_status
def main() -> int:
    """Answers one question about one recording; extras/command_line.py does everything else."""
    args = command_line.parse(make_parser())  # adds recordings, prompt, and options of `generate`
    if not args.is_one_question:
        return command_line.run(args)

    processor = AudioFlamingo3Processor.from_pretrained(args.model)
    waveform = command_line.read_recording(args, processor)  # processor.to_waveform(path)
    inputs = processor(args.prompt, waveform)
    del waveform  # frees its memory
    model = command_line.load_model(args)  # AudioFlamingo3ForConditionalGeneration.from_pretrained
    steps = model.stream(**inputs.to(model.device), **args.options)  # token ids, one by one

    report = command_line.Report(args)  # --timestamps, and the lines on stderr
    for text in terminal.styled(processor.stream_text(report.watch(steps))):
        print(text, end="", flush=True)
    print(flush=True)
    return report.finish(processor, model, inputs)


def make_parser() -> argparse.ArgumentParser:
    """The options that everybody needs; `command_line.parse` adds the others."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="generate.py [options] [audio ...] [prompt]",
        allow_abbrev=False,
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="audio ... prompt",
        help="""recordings (WAV, or with ffmpeg mp3, flac, ogg, m4a, opus, video), folders of
        them, - for standard input; then the prompt: the last argument, if it is not a file.
        Without a prompt, speech is transcribed""",
    )
    parser.add_argument(
        "--quiet", action="store_true", help="print nothing on stderr but errors and warnings"
    )

    add = parser.add_argument_group("model").add_argument
    add("--model", default=TINY, help="a directory or cached hub name (default: tiny/)")
    add("--device", default="auto", help="cpu, cuda or mps (default: the best available)")
    add("--dtype", default="auto", help="float32, bfloat16 or float16 (default: the checkpoint's)")

    answer = parser.add_argument_group("answer")
    choices = answer.add_mutually_exclusive_group()
    greedy_help = "always take the likeliest token (default: the model's generation_config.json)"
    choices.add_argument(
        "--greedy", dest="do_sample", action="store_const", const=False, help=greedy_help
    )
    sample_help = "draw tokens at random instead"
    choices.add_argument(
        "--sample", dest="do_sample", action="store_const", const=True, help=sample_help
    )
    add = answer.add_argument
    add("--max-new-tokens", type=int, metavar="N", help="at most N (default: the model's, or 512)")
    add("--temperature", type=float, metavar="T", help="sampling: above 1 is more random")
    top_k_help = "sampling: draw from the K likeliest tokens (default: the model's, or 50)"
    add("--top-k", type=int, metavar="K", help=top_k_help)
    top_p_help = "sampling: draw from the fewest tokens with a total probability of P"
    add("--top-p", type=float, metavar="P", help=top_p_help)
    add("--seed", type=int, help="makes sampling repeatable")
    timestamps_help = "print, after the answer, where in the recording each word is"
    add("--timestamps", action="store_true", help=timestamps_help)
    return parser


if __name__ == "__main__":
    terminal.exit_with_status(main())
