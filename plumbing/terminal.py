"""The terminal: untrusted text, one-line errors, Ctrl-C, streamed answers, progress."""

import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from itertools import chain, islice
from typing import NoReturn

INTERRUPTED = 130  # the exit status after Ctrl-C

# Control characters could manipulate a terminal, so they are escaped, except tab and newline.
CONTROL_CODES = [*range(9), *range(11, 32), *range(127, 160)]
VISIBLE = {code: f"\\x{code:02x}" for code in CONTROL_CODES}


def printable(text: str) -> str:
    """Escapes the control characters in untrusted text."""
    return text.translate(VISIBLE)


def as_utf_8(text: str) -> str:
    """Decodes bytes in the text that the locale's encoding lacks, if together they are UTF-8.

    Python represents them as surrogates: in the C locale, "ü" arrives as two.
    """
    with suppress(UnicodeEncodeError):  # other surrogates, for example half an emoji
        return text.encode(errors="surrogateescape").decode(errors="surrogateescape")
    return text


def one_line(message: object) -> str:
    return printable(" ".join(str(message).split()))


# ---- Streams ----


def prepare_streams() -> None:
    """Makes printing safe: closed streams, characters missing in the encoding, warnings.

    Every warning is printed. By default Python shows repeated ones only once.
    """
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")
    sys.stdout.reconfigure(errors="backslashreplace")
    sys.stderr.reconfigure(errors="backslashreplace")
    warnings.showwarning = print_warning
    warnings.simplefilter("always", UserWarning)


def print_warning(message, *_) -> None:
    with suppress(OSError):  # stderr may be full or closed
        if sys.stderr.isatty():
            write_status("")  # clear a progress line
        # Written at once, so that the lines of two threads do not mix.
        print(f"warning: {one_line(message)}\n", end="", file=sys.stderr)


def print_error(error: Exception) -> None:
    with suppress(OSError):
        print(f"error: {describe_error(error)}\n", end="", file=sys.stderr)


def refuse(message: str) -> None:
    """Replaces argparse's `error`, whose message has several lines."""
    for word in message.split():
        if word.startswith("-") and os.path.exists(word):
            raise ValueError(f"{word}: write ./{word}, because names with - are options.")
    raise ValueError(f"{message}; see --help")


def prepare_for_slow_imports() -> None:
    """For the beginning of a program: Ctrl-C during its imports would print a traceback."""
    exit_on_interrupt(end_line=False)
    check_packages(["torch", "numpy", "safetensors", "tiktoken"])


def exit_with_status(status: int) -> NoReturn:
    """Exits at once. sys.exit would try again to write what stdout has refused."""
    os._exit(status)


def check_packages(names: Iterable[str]) -> None:
    """Exits with a one-line error if a package is missing, for example outside the venv."""
    for name in names:
        if find_spec(name) is None:
            remedy = "as README.md says, activate .venv or install requirements.txt"
            print(f"error: the package {name} is not installed; {remedy}", file=sys.stderr)
            sys.exit(2)


def describe_error(error: Exception) -> str:
    """Returns the error as one line, without Python's "[Errno 13]"."""
    reason = getattr(error, "strerror", None)
    if reason is None:
        return one_line(error)
    if error.filename is None:  # only writing raises such an error
        return one_line(f"the output cannot be written: {reason}")
    name = error.filename2 or error.filename  # if there are two, the second is being written
    return one_line(f"{name}: {reason}")


def exit_with(main: Callable[[], int | None]) -> NoReturn:
    """Runs a program and exits with its status, or with 2 and one line on stderr for bad input."""
    try:
        status = main()
    except (ValueError, OSError, ImportError) as error:
        print_error(error)
        status = 2
    sys.exit(status)


@contextmanager
def memory_hint(hint: str) -> Iterator[None]:
    """If memory runs out inside this context, adds the hint to the error message."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        has_hint = str(error).startswith("out of memory; ")
        if "memory" not in repr(error).lower() or has_hint:
            raise
        raise MemoryError(f"out of memory; {hint}: {one_line(error)}") from None


def has_styles() -> bool:
    """Whether stdout is a terminal that supports text styles, and NO_COLOR is not set."""
    is_capable = os.environ.get("TERM", "dumb") != "dumb"
    return sys.stdout.isatty() and is_capable and "NO_COLOR" not in os.environ


def has_256_colors() -> bool:
    """Whether stdout is a terminal with 256 colors and Unicode, and NO_COLOR is not set."""
    is_capable = "256color" in os.environ.get("TERM", "")
    return has_styles() and is_capable and sys.stdout.encoding.lower() == "utf-8"


# ---- Ctrl-C ----


def exit_on_interrupt(end_line: bool = True) -> None:
    """From now on Ctrl-C exits at once, with status 130 and without a traceback.

    end_line: print a newline first. In a terminal one is always printed, after the echoed ^C.
    """

    def interrupt(*_) -> None:
        exit_interrupted(end_line)

    signal.signal(signal.SIGINT, interrupt)


def exit_interrupted(end_line: bool = True) -> None:
    if end_line or os.isatty(1):
        end = b"\n"
        if has_styles():
            end = NORMAL.encode() + end  # a dimmed thought may be unfinished
        with suppress(OSError):  # stdout may be closed or full
            os.write(1, end)
    os._exit(INTERRUPTED)


@contextmanager
def clean_up_on_interrupt() -> Iterator[None]:
    """Inside this context, Ctrl-C exits only after files have been closed and removed."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        exit_interrupted(end_line=False)
    finally:
        signal.signal(signal.SIGINT, handler)


# ---- Answers and progress ----


@contextmanager
def show_waiting(text: str, quiet: bool = False) -> Iterator[None]:
    """After one second, shows on stderr what is taking so long; in a terminal only."""
    if quiet or not sys.stderr.isatty():
        yield
        return
    done = threading.Event()

    def show() -> None:
        seconds = 0
        while not done.wait(timeout=1):
            seconds += 1
            write_status(f"{one_line(text)} ... {seconds} s")
        if seconds > 0:
            write_status("")

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def wait_for_first(steps: Iterable, text: str, quiet: bool) -> Iterator:
    """Returns the same steps; while waiting for the first, shows `text` as in `show_waiting`."""
    steps = iter(steps)
    with show_waiting(text, quiet):
        first = list(islice(steps, 1))
    return chain(first, steps)


def write_status(line: str) -> None:
    """Replaces the last line of stderr, which must be a terminal."""
    print(f"\r{line}\x1b[K", end="", file=sys.stderr, flush=True)


class StepTimer:
    """Records when each step of an answer arrived."""

    def __init__(self):
        self.start = time.perf_counter()
        self.seconds = []  # since the start, one for each step
        self.steps = []

    def watch(self, steps: Iterable) -> Iterator:
        for step in steps:
            self.seconds.append(time.perf_counter() - self.start)
            self.steps.append(step)
            yield step

    def summary(self, options) -> str:
        """A line about the speed. options: the `GenerationConfig` of the answer."""
        count = len(self.seconds)
        first = self.seconds[0]
        text = f"said {count} token{'s' * (count > 1)}: the first after {first:.2f} s"
        if count > 1:
            rate = (count - 1) / (self.seconds[-1] - first)
            text += f", then {rate:.1f} tokens/s"
        if options.do_sample:
            text += f", sampled at temperature {options.temperature:g}"
        return text


def describe_audio(batch: dict, audio_token_id: int) -> str:
    """A line about the recordings in a batch of the processor."""
    mask = batch["feature_attention_mask"]
    seconds = int(mask.sum()) / 100
    audio_frames = int((batch["input_ids"] == audio_token_id).sum())
    digits = 1 if seconds >= 1 else 2
    windows = plural(len(mask), "window")
    return f"heard {seconds:.{digits}f} s: {windows}, {plural(audio_frames, 'audio frame')}"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def styled(texts: Iterable[str]) -> Iterable[str]:
    """Yields the parts of an answer as they are printed.

    In a terminal, control characters are escaped, and the model's thoughts are dimmed.
    """
    if sys.stdout.isatty():
        texts = map(printable, texts)
    if has_styles():
        texts = dim_thoughts(texts)
    return texts


def print_as_it_comes(texts: Iterable[str]) -> None:
    """Prints the parts of an answer as they arrive, then a newline."""
    for text in styled(texts):
        print(text, end="", flush=True)
    print(flush=True)


DIM = "\x1b[2m"
NORMAL = "\x1b[0m"


def dim_thoughts(texts: Iterable[str]) -> Iterator[str]:
    """Yields the parts of an answer with <think> ... </think> dimmed.

    A tag may be split across parts. So if the end of a part may be the beginning of a tag, it is
    held back until more text arrives.
    """
    tag = "<think>"  # the next one expected
    held = ""
    for text in texts:
        held += text
        while tag in held:
            before, _, held = held.partition(tag)
            if tag == "<think>":
                yield before + DIM + tag
                tag = "</think>"
            else:
                yield before + tag + NORMAL
                tag = "<think>"
        kept = longest_beginning(tag, held)
        yield held[: len(held) - kept]
        held = held[len(held) - kept :]
    if tag == "</think>":  # the answer ended in the middle of a thought
        held += NORMAL
    yield held


def longest_beginning(tag: str, text: str) -> int:
    """Returns how many characters at the end of the text could begin the tag."""
    for length in range(len(tag) - 1, 0, -1):
        if text.endswith(tag[:length]):
            return length
    return 0


class Progress:
    """A progress line on stderr, in a terminal only: items done, items a second, seconds left."""

    def __init__(self, total: int, quiet: bool = False):
        self.total = total
        self.shown = sys.stderr.isatty() and not quiet
        self.restart()

    def restart(self) -> None:
        self.start = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def show(self, done: int) -> None:
        rate = done / self.seconds()
        left = (self.total - done) / rate
        self.write(f"{done} of {self.total}, {rate:.2f} a second, {left:.0f} s left ")

    def clear(self) -> None:
        self.write("")

    def write(self, line: str) -> None:
        if self.shown:
            write_status(line)
