"""Conversations: turns that share one key-value cache, in Python or in the terminal.

conversation = Conversation(processor, model)
question = conversation.question("What is this?", ["rain.wav"])
print("".join(processor.stream_text(conversation.answer(question))))
"""

import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress

import torch
from torch import Tensor

from af3 import AudioFlamingo3ForConditionalGeneration
from plumbing import terminal
from processor import AudioFlamingo3Processor, Batch


class Conversation:
    """Turns that share one cache, so that each costs only what is new in it."""

    def __init__(
        self, processor: AudioFlamingo3Processor, model: AudioFlamingo3ForConditionalGeneration
    ):
        capacity = model.config.text_config.max_position_embeddings
        self.processor = processor
        self.model = model
        self.cache = model.new_cache(rows=1, capacity=capacity)
        self.stopped = False  # set it to end the answer that is being generated
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.cache.length = 0
        self.past_ids: list[int] = []  # the ids that the cache holds
        self.pending_ids: list[int] = []  # the end of the last turn, which it does not hold yet

    def question(self, text: str, audios: Iterable = ()) -> Batch:
        """The model's inputs for a user turn: the end of the turn before, this one, and the header
        of the answer. `audios` are files or 1-D samples at 16 kHz."""
        content = [{"type": "audio", "audio": audio} for audio in audios]
        content.append({"type": "text", "text": text})
        messages = [{"role": "user", "content": content}]
        if self.pending_ids:
            # A system message of None is skipped, and it keeps the default one from being added.
            messages.insert(0, {"role": "system", "content": None})
        batch = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        pending_ids = torch.tensor([self.pending_ids], dtype=torch.long)
        batch["input_ids"] = torch.cat([pending_ids, batch["input_ids"]], dim=1)
        del batch["attention_mask"]  # every token is real
        return batch.to(self.model.device)

    def answer(self, question: Batch, **options) -> Iterator[Tensor]:
        """The new ids of the answer, each (1,), as soon as they are known; options of `generate`.

        An answer that is stopped, or fails, stays in the conversation as far as it has come.
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
            self.cache.length = length  # a step that failed half-way leaves nothing behind
            if new_ids:
                self.keep(question["input_ids"][0].tolist(), new_ids)

    def keep(self, question_ids: list[int], new_ids: list[int]) -> None:
        """Notes what the cache holds now, and how the turn will end.

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


HELP = "A line is a question. /audio FILE adds a sound, /reset forgets everything, /quit ends."


class TerminalChat:
    """A conversation in which each line of stdin is a question or a command.

    Ctrl-C ends an answer; a second one, or one while a line is awaited, ends the conversation.
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
        self.options = options
        self.quiet = quiet
        self.awaits_line = False

    def run(self, first_question: str | None = None) -> None:
        with suppress(ImportError):  # not on Windows
            import readline  # noqa: F401  gives input() a history
        signal.signal(signal.SIGINT, self.interrupt)
        sys.stdin = sys.stdin or open(os.devnull)  # None if it is closed
        sys.stdin.reconfigure(errors="replace")
        if sys.stdin.isatty() and not self.quiet:
            print(HELP, file=sys.stderr)
        line = first_question
        try:
            while line != "/quit":
                if line is not None:
                    self.obey(line)
                line = self.read_line()
        except EOFError:
            if sys.stdin.isatty():
                print()
        except KeyboardInterrupt:
            terminal.exit_interrupted()

    def interrupt(self, *_) -> None:
        """What Ctrl-C does."""
        if self.awaits_line or self.conversation.stopped:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a further one must not stop the exit
            raise KeyboardInterrupt  # and no exit here: readline must restore the terminal first
        self.conversation.stopped = True

    def read_line(self) -> str:
        in_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self.awaits_line = True
        line = input("> " if in_terminal else "").strip()
        self.awaits_line = False
        self.conversation.stopped = False
        return line

    def obey(self, line: str) -> None:
        """Answers a question or obeys a command. An error does not end the conversation."""
        command, _, name = line.replace("\t", " ").partition(" ")
        try:
            if command == "/audio" and name:
                self.audios.append(self.processor.to_waveform(os.path.expanduser(name.strip())))
            elif command == "/reset":
                self.conversation.reset()
                self.audios = []
            elif command.startswith("/"):
                raise ValueError(f"{command} is none of /audio FILE, /reset and /quit.")
            elif line:
                self.ask(line)
        except BrokenPipeError:
            raise
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            terminal.print_error(error)

    def ask(self, text: str) -> None:
        timer = terminal.StepTimer()
        question = self.conversation.question(text, self.audios)
        steps = timer.watch(self.conversation.answer(question, **self.options))
        terminal.print_as_it_comes(self.processor.stream_text(steps))
        self.audios = []
        if not self.quiet:
            print(timer.summary(), file=sys.stderr)
