"""The full command line of generate.py: all flags, their combinations, exit statuses, and modes.

generate.py answers one question about one recording; `run` does everything else.
"""

import argparse
import dataclasses
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import wraps

import torch
from torch import Tensor

from af3 import AudioFlamingo3ForConditionalGeneration, GenerationConfig
from load_weights import tokenizer_folder
from plumbing import terminal
from plumbing.audio_file import AUDIO_SUFFIXES, check_is_no_url, stdin_as_file
from plumbing.check_checkpoint import is_quantized
from plumbing.check_inputs import SAMPLING_OPTIONS, check_plain_prompt
from plumbing.devices import choose_device, choose_dtype
from plumbing.find_checkpoint import find_checkpoint
from plumbing.json_file import read_fields
from plumbing.positional_arguments import STDIN, split_words
from plumbing.processes import num_processes
from plumbing.terminal import refuse
from plumbing.timeline import find_gaps
from processor import SAMPLE_RATE, AudioFlamingo3Processor

SHORTER_HINT = "shorten the audio or lower --max-new-tokens"  # for when memory runs out


def exit_status(main: Callable[[], int]) -> Callable[[], int]:
    """A decorator for the main function of generate.py, which returns its exit status.

    0, or 2 for bad input or too little memory, with one line `error: ...`; 1 if some of many
    recordings failed, or a line of a conversation that comes from a pipe. Under torchrun, 0 even
    if some recordings failed. Ctrl-C exits with 130 and keeps what has been printed.
    """

    @wraps(main)
    def guarded_main() -> int:
        terminal.prepare_streams()
        try:
            processes = nullcontext()
            if num_processes() > 1:
                from extras import parallel

                processes = parallel.joined_processes()
            with processes, terminal.memory_hint(SHORTER_HINT):
                status = main()
                sys.stdout.flush()  # os._exit does not; shows whether the reader is gone
            # torchrun takes any other status for a crash. The lines say which recordings failed.
            if num_processes() > 1:
                return 0
            return status
        except BrokenPipeError:  # the reader has enough, as in `| head -1`
            return 0
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            terminal.print_error(error)
            return 2

    return guarded_main


# ---- Options ----


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parses and checks the command line, with the options in the parser and all others.

    Adds to the result: recordings and prompt, the options of `generate`, and is_one_question.
    Raises ValueError.
    """
    parser.error = refuse
    add_options(parser)
    check_given_once(sys.argv[1:])
    args = parser.parse_intermixed_args(join_page_name(sys.argv[1:]))
    check_combination(args)
    for word in args.words:
        check_is_no_url(word)
    may_be_prompt = bool(args.prompts or args.chat)
    args.recordings, args.prompt = split_words(args.words, AUDIO_SUFFIXES, may_be_prompt)
    if not (args.recordings or args.chat or args.prompts or args.save):
        refuse("the following arguments are required: audio")
    if args.prompt is None and not args.chat and not args.save:
        args.prompt = transcription_prompt(args.model)
    if args.prompt is not None:
        args.prompt = terminal.as_utf_8(args.prompt)
        check_plain_prompt(args.prompt)
        if not args.prompt.strip():
            refuse("the prompt is empty")
    args.options = generation_options(args)
    if STDIN in args.recordings and (args.chat or wants_json_lines(args)):
        raise ValueError(
            "Standard input, -, must be the only recording; it does not go with --chat, "
            "--prompts, --output, --resume and --batch-size."
        )
    if args.tensor_parallel or num_processes() > 1:
        from extras import parallel

        is_for_many = not (args.chat or args.save) and wants_json_lines(args)
        parallel.check_options(args, is_for_many)
        args.device = parallel.own_device(args.device)
    has_mode = args.save or args.chat or args.explain is not None
    args.is_one_question = not has_mode and not wants_json_lines(args)
    return args


def transcription_prompt(model: str) -> str:
    """What is asked where there is no prompt: the checkpoint may have its own."""
    fields = read_fields(find_checkpoint(model) / "processor_config.json")
    default = AudioFlamingo3Processor.default_transcription_prompt
    return fields.get("default_transcription_prompt", default)


def add_options(parser: argparse.ArgumentParser) -> None:
    penalty_help = "above 1: tokens in the prompt and in the answer so far become less likely"
    parser.add_argument("--repetition-penalty", type=float, metavar="R", help=penalty_help)
    add_model_changes(parser.add_argument_group("changes of the model").add_argument)
    modes = parser.add_argument_group("instead of one answer").add_mutually_exclusive_group()
    add_modes(modes.add_argument)
    add_options_for_many(parser.add_argument_group("many recordings, as JSON lines").add_argument)


def add_model_changes(add: Callable) -> None:
    int8_help = "store the decoder in int8: half the memory and, for a large model, faster on a CPU"
    add("--int8", action="store_true", help=int8_help)
    int4_help = "store the decoder in int4: a third of the memory, faster again, less exact"
    add("--int4", action="store_true", help=int4_help)
    think_help = """merge the AF-Think adapter in the model's directory; end the prompt with:
    Please think and reason about the input audio before you respond."""
    add("--think", action="store_true", help=think_help)
    adapter_help = "merge the LoRA adapter in DIR, as peft saves it; may be given several times"
    add("--adapter", action="append", metavar="DIR", help=adapter_help)
    parallel_help = "under torchrun: split the model over the processes, not the recordings"
    add("--tensor-parallel", action="store_true", help=parallel_help)


def add_modes(add: Callable) -> None:
    add("--chat", action="store_true", help="hold a conversation in the terminal")
    explain_help = """show the way through the model, and where in the recording each word of the
    answer looked; with a name that ends in .html, as a page for the browser"""
    add("--explain", nargs="?", const="", metavar="PAGE.html", help=explain_help)
    prompts_help = """read JSON lines, or an array, with "audio", "prompt", perhaps "choices", and
    any other fields, which are kept; - is standard input"""
    add("--prompts", metavar="FILE", help=prompts_help)
    save_help = """write the model, as these options change it, to DIR, for --model; with --int4,
    it then loads in seconds"""
    add("--save", metavar="DIR", help=save_help)


def add_options_for_many(add: Callable) -> None:
    fields_help = "with --prompts: other names for two fields, audio=NAME,prompt=NAME"
    add("--fields", metavar="MAP", help=fields_help)
    choose_help = """with --prompts: answer with the likeliest of the "choices", which are then
    not listed in the prompt"""
    add("--choose", action="store_true", help=choose_help)
    add("--batch-size", type=int, metavar="N", help="answer N recordings at a time (default: 8)")
    output_help = """write the lines there; given again, resume: ask what has no answer yet, and
    again what failed"""
    add("--output", metavar="FILE", help=output_help)
    add("--resume", metavar="FILE", help="skip what FILE already answers; append to it: >> FILE")


def check_given_once(words: list[str]) -> None:
    """Refuses a second file where argparse would forget the first."""
    for option in ("--prompts", "--output", "--resume", "--save"):
        if sum(word.partition("=")[0] == option for word in words) > 1:
            refuse(f"{option} is given twice; it takes one name")


def join_page_name(words: list[str]) -> list[str]:
    """The command line with --explain PAGE.html in one word, or "--explain=" where there is no page.

    argparse would take whatever follows --explain for the page, the recording too.
    """
    if "--explain" not in words[:-1]:
        return words
    place = words.index("--explain")
    following = words[place + 1]
    if following.lower().endswith(".html"):
        return [*words[:place], f"--explain={following}", *words[place + 2 :]]
    return [*words[:place], "--explain=", *words[place + 1 :]]


def wants_json_lines(args: argparse.Namespace) -> bool:
    """Whether there is more than one recording, or an option that is for many."""
    if args.prompts or args.resume or args.output or args.batch_size is not None:
        return True
    return len(args.recordings) > 1 or os.path.isdir(args.recordings[0])


def check_combination(args: argparse.Namespace) -> None:
    """Refuses options that would have no effect."""
    for name in ("model", "prompts", "save", "output", "resume", "fields"):
        if getattr(args, name) == "":
            refuse(f"--{name} is empty")
    needs = {"fields": "--prompts", "choose": "--prompts"}
    if args.chat or args.save or args.explain is not None:
        needs |= dict.fromkeys(["batch_size", "output", "resume"], "JSON lines")
        needs["timestamps"] = "answers without --chat, --explain and --save"
    if args.save and args.words:
        refuse("--save answers nothing; a recording or prompt has no effect")
    if args.save and os.path.exists(args.save) and not is_empty_folder(args.save):
        refuse(f"--save is {args.save}, which exists; choose a new or an empty directory")
    if args.int8 and args.int4:
        refuse("--int8 and --int4 exclude each other")
    for name, needed in needs.items():
        value = getattr(args, name)
        if value is not None and value is not False and not args.prompts:
            refuse(f"--{name.replace('_', '-')} is only for {needed}")
    if args.output and args.resume:
        refuse("--output resumes by itself; --resume is for standard output")
    if args.output and args.prompts and is_same_file(args.output, args.prompts):
        refuse(f"--output is the file of --prompts, {args.prompts}, which would be lost")
    if args.choose or args.save:
        check_no_generation(args)


def check_no_generation(args: argparse.Namespace) -> None:
    mode = "--choose" if args.choose else "--save"
    for option in ("do_sample", "max_new_tokens", "repetition_penalty", *SAMPLING_OPTIONS):
        if getattr(args, option) not in (None, False):  # --greedy is true of what is not sampled
            name = "--sample" if option == "do_sample" else f"--{option.replace('_', '-')}"
            refuse(f"{mode} generates nothing, so {name} has no effect")


def is_empty_folder(path: str) -> bool:
    return os.path.isdir(path) and not os.listdir(path)


def is_same_file(path: str, other: str) -> bool:
    return os.path.realpath(path) == os.path.realpath(other)


def generation_options(args: argparse.Namespace) -> dict:
    """The options of `generate` that were given; for the others, the checkpoint decides."""
    if args.seed is not None:
        torch.manual_seed(args.seed % 2**64)
    options = {}
    for option in dataclasses.fields(GenerationConfig):
        if getattr(args, option.name, None) is not None:
            options[option.name] = getattr(args, option.name)
    given = [name for name in (*SAMPLING_OPTIONS, "seed") if getattr(args, name) is not None]
    if given and not is_sampled(args):
        name = given[0].replace("_", "-")
        refuse(f"--{name} has no effect, because nothing is sampled; add --sample")
    GenerationConfig(**options | {"do_sample": bool(given)})  # refuses a value out of range
    return options


def is_sampled(args: argparse.Namespace) -> bool:
    """Whether tokens are drawn at random: the command line says it, else the checkpoint."""
    if args.do_sample is not None:
        return args.do_sample
    path = tokenizer_folder(find_checkpoint(args.model)) / "generation_config.json"
    return read_fields(path).get("do_sample") is True


# ---- Steps of every mode ----


def load_model(args: argparse.Namespace) -> AudioFlamingo3ForConditionalGeneration:
    """The model, with the adapter merged and the decoder quantized if that was asked for."""
    hint = "use a smaller --dtype" if args.int4 else "use --int4 or --int8, or a smaller --dtype"
    with terminal.memory_hint(hint):
        model = load_changed_model(args)
    from extras.short_windows import encode_short_windows_apart

    encode_short_windows_apart(model)
    if model.device.type == "cpu" and not args.tensor_parallel:
        from extras.long_prompts import use_unmasked_attention

        use_unmasked_attention(model)
        if model.dtype == torch.bfloat16:
            from extras.float32_matmul import use_float32_matmul

            use_float32_matmul(model)  # only on a CPU without bfloat16 arithmetic
    use_one_thread_if_small(model)
    return model


def use_one_thread_if_small(model: AudioFlamingo3ForConditionalGeneration) -> None:
    """Threads of a small model mostly wait for each other, on a busy machine even longer.

    With tiny/, one thread is as fast as two, and three times as fast beside two busy programs.
    """
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    if num_parameters < 20_000_000 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def load_changed_model(args: argparse.Namespace) -> AudioFlamingo3ForConditionalGeneration:
    choose_dtype(args.dtype, torch.float32)  # refuses an unknown one before the model is loaded
    is_changed = args.think or args.adapter or args.int8 or args.int4 or args.tensor_parallel
    if is_quantized(args.model):
        from extras.quantize import load_quantized

        if is_changed:
            refuse(
                f"{args.model} is quantized; --int8, --int4, --think, --adapter and "
                "--tensor-parallel change others"
            )
        return load_quantized(args.model, args.device, args.dtype)
    if not is_changed:
        return AudioFlamingo3ForConditionalGeneration.from_pretrained(
            args.model, args.device, args.dtype
        )
    # Weights are changed on the CPU, one layer at a time, before they move to the device.
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(args.model, "cpu")
    if args.think or args.adapter:
        from extras.lora import find_think_adapter, merge_adapter

        if args.think:
            merge_adapter(model, find_think_adapter(args.model))
        for folder in args.adapter or []:
            merge_adapter(model, folder)
    if args.tensor_parallel:
        from extras.parallel import split_model

        split_model(model, choose_device(args.device))
    model.to(choose_dtype(args.dtype, model.dtype))
    if args.int8 or args.int4:
        from extras.quantize import quantize

        quantize(model, bits=4 if args.int4 else 8)
    return model.to(choose_device(args.device))


def read_recording(
    args: argparse.Namespace, processor: AudioFlamingo3Processor, number: int = 0
) -> Tensor:
    """The waveform of one of args.recordings, which is a file or standard input."""
    name = args.recordings[number]
    with terminal.show_waiting(f"reading {name}", args.quiet), terminal.memory_hint(SHORTER_HINT):
        if name != STDIN:
            return read_file(args, processor, name)
        with terminal.clean_up_on_interrupt(), stdin_as_file() as path:

            def warn(message: str) -> None:
                warnings.warn(message.replace(path, "standard input"))

            return read_file(args, processor, path, warn=warn)


def read_file(
    args: argparse.Namespace, processor: AudioFlamingo3Processor, path: str, **options
) -> Tensor:
    """The waveform of a file; where times will be shown, args.gaps are those of its film."""
    waveform = processor.to_waveform(path, **options)
    if args.timestamps or args.explain is not None:
        args.gaps = find_gaps(path, len(waveform) / SAMPLE_RATE)
    return waveform


class Report:
    """What is printed beside an answer: --timestamps, and the statistics on stderr."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.timer = terminal.StepTimer()
        terminal.exit_on_interrupt()

    def watch(self, steps: Iterable[Tensor]) -> Iterator[Tensor]:
        """The same steps; while the first is awaited, the terminal says so."""
        steps = self.timer.watch(steps)
        return terminal.wait_for_first(
            steps, "reading the recording and the prompt", self.args.quiet
        )

    def finish(
        self,
        processor: AudioFlamingo3Processor,
        model: AudioFlamingo3ForConditionalGeneration,
        inputs: dict,
    ) -> int:
        """Returns the exit status."""
        if self.args.timestamps:
            from extras.alignment import align, print_words

            new_ids = torch.cat(self.timer.steps)
            print_words(align(processor, model, inputs, new_ids, self.args.gaps))
        if not self.args.quiet:
            print(terminal.describe_audio(inputs, processor.audio_token_id), file=sys.stderr)
            options = dataclasses.replace(model.generation_config, **self.args.options)
            print(self.timer.summary(options), file=sys.stderr)
            if len(self.timer.steps) == options.max_new_tokens:
                print("ended by the limit, which --max-new-tokens sets", file=sys.stderr)
        return 0


# ---- Modes ----


def run(args: argparse.Namespace) -> int:
    """Does what the command line asks for, other than one answer; returns the exit status."""
    if args.save:
        save(args)
    elif args.chat:
        return chat(args)
    elif args.explain is not None:
        explain_one(args)
    else:
        from extras.answer_lines import answer_many

        return answer_many(args, load_model)
    return 0


def save(args: argparse.Namespace) -> None:
    """Writes a checkpoint of the model as the options change it."""
    processor = AudioFlamingo3Processor.from_pretrained(args.model)
    model = load_model(args)
    processor.save_pretrained(args.save)
    if args.int8 or args.int4 or is_quantized(args.model):
        from extras.quantize import save_quantized

        save_quantized(model, args.save)
    else:
        model.save_pretrained(args.save)
    if not args.quiet:
        print(f"{args.save}: give it as --model", file=sys.stderr)


def chat(args: argparse.Namespace) -> int:
    """Holds a conversation; the exit status is 1 if a line that came from a pipe has failed."""
    from extras.chat import TerminalChat

    processor = AudioFlamingo3Processor.from_pretrained(args.model)
    waveforms = [read_recording(args, processor, i) for i in range(len(args.recordings))]
    model = load_model(args)
    return TerminalChat(processor, model, waveforms, args.options, args.quiet).run(args.prompt)


def explain_one(args: argparse.Namespace) -> None:
    """Explains the answer in the terminal, or in the page args.explain."""
    from extras.explain import explain
    from extras.explain_page import check_page_name, write_page

    if len(args.recordings) != 1 or os.path.isdir(args.recordings[0]):
        raise ValueError("--explain takes one sound file.")
    if args.explain:
        check_page_name(args.explain)
    processor = AudioFlamingo3Processor.from_pretrained(args.model)
    waveform = read_recording(args, processor)
    model = load_model(args)
    if not args.explain:
        explain(processor, model, waveform, args.prompt, args.options, args.gaps)
        return
    name = args.recordings[0]
    write_page(args.explain, processor, model, waveform, name, args.prompt, args.options, args.gaps)
    if not args.quiet:
        print(f"{args.explain}: open it in a browser", file=sys.stderr)
