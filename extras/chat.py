"""Conversations: turns that share one key-value cache, in Python or in the terminal.

conversation = Conversation(processor, model)
question = conversation.question("What is this?", ["rain.wav"])
print("".join(processor.stream_text(conversation.answer(question))))
"""

import os
import shlex
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import chain, islice

import torch
import torch.nn.functional as F
from torch import Tensor

from af3 import AudioFlamingo3ForConditionalGeneration, KeyValueCache, Qwen2Config
from extras.many_recordings import count_audio_frames
from plumbing import terminal
from plumbing.transformers_conventions import Batch
from processor import SAMPLE_RATE, AudioFlamingo3Processor

FIRST_TOKENS = 2048  # the room in a new conversation


class GrowingCache(KeyValueCache):
    """A cache for `capacity` tokens that takes memory only for those that it has read.

    A long context would otherwise take gigabytes before the first word. The memory doubles each
    time it is full, one layer after another.
    """

    def __init__(self, config: Qwen2Config, rows: int, capacity: int, dtype, device):
        super().__init__(config, rows, min(FIRST_TOKENS, capacity), dtype, device)
        self.capacity = capacity

    def extend(self, is_real: Tensor) -> Tensor:
        needed = self.length + is_real.shape[1]
        room = self.is_real.shape[1]
        if needed > room:
            self.grow(min(max(needed, 2 * room), self.capacity))
        return super().extend(is_real)

    def grow(self, tokens: int) -> None:
        more = tokens - self.is_real.shape[1]
        self.is_real = F.pad(self.is_real, (0, more))
        for layer in range(len(self.keys)):
            self.keys[layer] = F.pad(self.keys[layer], (0, 0, 0, more))
            self.values[layer] = F.pad(self.values[layer], (0, 0, 0, more))


class Conversation:
    """Turns that share one cache, so that a turn processes only its new tokens."""

    def __init__(
        self, processor: AudioFlamingo3Processor, model: AudioFlamingo3ForConditionalGeneration
    ):
        config = model.config.text_config
        capacity = config.max_position_embeddings
        self.processor = processor
        self.model = model
        self.cache = GrowingCache(config, 1, capacity, model.dtype, model.device)
        self.stopped = False  # set to True to end the answer that is being generated
        self.reset()

    def reset(self) -> None:
        """Clears the conversation."""
        self.cache.length = 0
        self.past_ids: list[int] = []  # the ids in the cache
        self.pending_ids: list[int] = []  # the end of the last turn, not in the cache yet

    def question(self, text: str, audios: Iterable = ()) -> Batch:
        """The model's inputs for a user turn: the end of the previous turn, this turn, and the
        header of the answer. `audios` are files or 1-D samples at 16 kHz."""
        content = [{"type": "audio", "audio": audio} for audio in audios]
        content.append({"type": "text", "text": text})
        messages = [{"role": "user", "content": content}]
        batch = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        input_ids = batch["input_ids"]
        if self.pending_ids:  # the system turn comes only once
            input_ids = input_ids[:, self.num_system_ids() :]
        pending_ids = torch.tensor([self.pending_ids], dtype=torch.long)
        batch["input_ids"] = torch.cat([pending_ids, input_ids], dim=1)
        del batch["attention_mask"]  # every token is real
        return batch.to(self.model.device)

    def num_system_ids(self) -> int:
        system_turn = ("system", [self.processor.system_message])
        pieces = self.processor.lay_out([system_turn], add_generation_prompt=False)
        return len(self.processor.tokenizer.encode_pieces(pieces))

    def answer(self, question: Batch, **options) -> Iterator[Tensor]:
        """Yields the new ids of the answer, each (1,). Options are those of `generate`.

        If it is stopped or fails, the ids generated so far stay in the conversation.
        """
        past_ids = torch.tensor([self.past_ids], dtype=torch.long, device=self.model.device)
        new_ids: list[int] = []
        length = self.cache.length
        steps = self.model.stream(**question, cache=self.cache, past_ids=past_ids, **options)
        try:
            for ids in steps:
                length = self.cache.length
                new_ids.append(int(ids))
                yield ids
                if self.stopped:
                    return
        finally:
            self.stopped = False
            self.cache.length = length  # drops what a failed step has added
            if new_ids:
                self.keep(question["input_ids"][0].tolist(), new_ids)

    def keep(self, question_ids: list[int], new_ids: list[int]) -> None:
        """Records which ids are in the cache now, and how the turn will end.

        The last new id is not in the cache yet. If it ended the answer, the end of the turn in the
        chat template takes its place.
        """
        *read_ids, last_id = new_ids
        self.past_ids += question_ids + read_ids
        self.pending_ids = []
        if last_id not in self.processor.tokenizer.special_ids:
            self.pending_ids.append(last_id)
        self.pending_ids.append(self.processor.end_id)
        self.pending_ids += self.processor.tokenizer.encode("\n")


class Abandoned(Exception):
    """Raised by Ctrl-C while something is read; the conversation stays as it was."""


HELP = """Each line is a question.
/audio FILE    adds a recording to the next question
/reset         starts a new conversation
/help          shows this
/quit          ends the conversation; so does Ctrl-C on an empty line
Ctrl-C         cancels reading, stops an answer, or clears the line"""


class TerminalChat:
    """A conversation in which each line of stdin is a question or a command.

    Ctrl-C cancels the reading of a recording or question, or stops an answer. A second Ctrl-C, or
    one on an empty line, ends the conversation.
    """

    def __init__(
        self,
        processor: AudioFlamingo3Processor,
        model: AudioFlamingo3ForConditionalGeneration,
        audios: list[Tensor],
        options: dict,
        quiet: bool = False,
    ):
        self.processor = processor
        self.conversation = Conversation(processor, model)
        self.audios = audios  # for the next question
        self.has_failed = False
        self.options = options
        self.all_options = replace(model.generation_config, **options)
        check_room(self.all_options.max_new_tokens, self.conversation.cache.capacity)
        self.quiet = quiet
        self.awaits_line = False
        self.line_is_half_typed = False
        self.may_be_abandoned = False
        self.readline = None

    def run(self, first_question: str | None = None) -> int:
        """Returns the exit status: 1 if a line from a pipe has failed, else 0."""
        with suppress(ImportError):  # not on Windows
            import readline  # gives input() a history

            # Tab completes file names. On macOS, this module is libedit under another name.
            is_libedit = "libedit" in (readline.__doc__ or "")
            readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
            readline.set_completer_delims(" \t\n\"'")
            self.readline = readline
        signal.signal(signal.SIGINT, self.interrupt)
        sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # None if it is closed
        sys.stdin.reconfigure(errors="surrogateescape")  # as in file names
        if sys.stdin.isatty():
            self.tell(HELP)
        line = first_question
        try:
            while line is None or line.split()[:1] != ["/quit"]:
                if line is not None:
                    self.obey(line)
                line = self.read_line()
        except EOFError:
            if sys.stdin.isatty():
                print()
        except KeyboardInterrupt:
            terminal.exit_interrupted()
        return int(self.has_failed and not sys.stdin.isatty())  # a user has seen the error

    def tell(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr)

    def interrupt(self, *_) -> None:
        """Handles Ctrl-C."""
        if self.may_be_abandoned:
            self.may_be_abandoned = False
            raise Abandoned("Stopped; nothing was added to the conversation.")
        if not self.awaits_line and not self.conversation.stopped:
            self.conversation.stopped = True
            return
        self.line_is_half_typed = False
        if self.awaits_line and self.readline is not None:
            self.line_is_half_typed = self.readline.get_line_buffer() != ""
        if not self.line_is_half_typed:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # another Ctrl-C must not stop the exit
        raise KeyboardInterrupt  # rather than exit: readline must restore the terminal first

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Within the context, a line shows what is being done, and Ctrl-C raises `Abandoned`."""
        with terminal.show_waiting(text, self.quiet):
            self.may_be_abandoned = True
            try:
                yield
            finally:
                self.may_be_abandoned = False

    def read_line(self) -> str:
        in_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        while True:
            try:
                self.awaits_line = True
                line = input("> " if in_terminal else "").strip()
                break
            except KeyboardInterrupt:
                if not self.line_is_half_typed:
                    raise
                print()
        self.awaits_line = False
        self.conversation.stopped = False
        return line

    def obey(self, line: str) -> None:
        """Answers a question or obeys a command. An error does not end the conversation."""
        command, _, name = line.replace("\t", " ").partition(" ")
        try:
            if command == "/audio":
                self.add_audio(file_name(name.strip()))
            elif command == "/reset":
                self.conversation.reset()
                self.audios = []
            elif command == "/help":
                print(HELP, file=sys.stderr)
            elif os.path.isfile(file_name(line)):
                raise ValueError(f"{line}: to add a recording, write /audio {line}")
            elif command.startswith("/"):
                raise ValueError(
                    f"{command} is unknown; the commands are /audio FILE, /reset, /help and /quit."
                )
            elif line:
                self.ask(terminal.as_utf_8(line))
        except BrokenPipeError:
            raise
        except Abandoned as stop:
            print(stop, file=sys.stderr)
            if self.audios:
                print(
                    "Recordings stay for the next question; /reset removes them.", file=sys.stderr
                )
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            terminal.print_error(error)
            self.has_failed = True

    def add_audio(self, name: str) -> None:
        """Adds a recording to the next question, if the context has room for it."""
        if not name:
            raise ValueError("/audio needs a file name.")
        with self.waiting(f"reading {name}"):
            waveform = self.processor.to_waveform(name)
        cache = self.conversation.cache
        tokens = cache.length
        for audio in [*self.audios, waveform]:
            tokens += count_audio_frames(audio)
        if tokens + self.all_options.max_new_tokens > cache.capacity:
            raise ValueError(
                f"{name}: no room for it beside the {cache.length} tokens of the conversation, "
                f"{len(self.audios)} recordings that wait for a question, and "
                f"{self.all_options.max_new_tokens} tokens of an answer; /reset makes room."
            )
        self.audios.append(waveform)
        seconds = len(waveform) / SAMPLE_RATE
        self.tell(f"{seconds:.1f} s; the context is {tokens / cache.capacity:.0%} full")

    def ask(self, text: str) -> None:
        timer = terminal.StepTimer()
        with self.waiting("reading"):
            question = self.conversation.question(text, self.audios)
            steps = timer.watch(self.conversation.answer(question, **self.options))
            first_step = list(islice(steps, 1))
        terminal.print_as_it_comes(self.processor.stream_text(chain(first_step, steps)))
        self.audios = []
        if "feature_attention_mask" in question:
            self.tell(terminal.describe_audio(question, self.processor.audio_token_id))
        self.tell(timer.summary(self.all_options))


def check_room(max_new_tokens: int, capacity: int) -> None:
    if max_new_tokens >= capacity:
        raise ValueError(
            f"--max-new-tokens is {max_new_tokens}, but the context holds {capacity} tokens, "
            "questions and answers together."
        )


def file_name(text: str) -> str:
    """A file name as a user types it: with ~, in quotes, or with escaped spaces."""
    if not os.path.exists(text):
        with suppress(ValueError):  # a quote that is not closed
            words = shlex.split(text)
            if len(words) == 1:
                text = words[0]
    return os.path.expanduser(text)
