"""Positional arguments: recordings first, then the prompt. Ambiguous ones are errors."""

import os
import re
from collections.abc import Collection
from pathlib import Path

STDIN = "-"  # stands for a recording on standard input


def split_words(
    words: list[str], suffixes: Collection[str], may_be_prompt: bool
) -> tuple[list[str], str | None]:
    """Returns the recordings and the prompt: the last word if it is not a file, otherwise None.

    suffixes: those of sound files. may_be_prompt: a single word may be the prompt.
    Raises ValueError, with a suggestion, if the words are ambiguous.
    """
    recordings = [word for word in words if is_recording(word)]
    others = [word for word in words if not is_recording(word)]
    for word in others:
        check_is_no_missing_file(word, suffixes)
    if not others:
        return recordings, None
    if not recordings and not may_be_prompt:
        remedy = ""
        if " " in others[0]:
            remedy = " A prompt comes after its recording."
        name = others[0] or "''"
        raise FileNotFoundError(f"{name}: no such file; a sound file is expected.{remedy}")
    if len(others) > 1:
        prompt = " ".join(others)
        raise ValueError(
            f"{others[0]!r} and {others[1]!r} are not files, and only one prompt is expected; "
            f'put it in quotes: "{prompt}".'
        )
    if words[-1] != others[0]:
        raise ValueError(
            f"{others[0]!r} is not a file; the recordings come first, then the prompt: "
            f'{" ".join(recordings)} "{others[0]}".'
        )
    return recordings, others[0]


def is_recording(word: str) -> bool:
    """Whether the word is "-" (standard input) or an existing file or folder."""
    return word == STDIN or os.path.exists(word)


def check_is_no_missing_file(word: str, suffixes: Collection[str]) -> None:
    """Refuses a prompt that looks like a mistyped recording, folder or option."""
    if re.match("[\u2013\u2014]", word):
        raise ValueError(f"{word}: begins with a dash; an option begins with two hyphens, --.")
    if Path(word).suffix.lower() in suffixes:
        remedy = ""
        if " " in word:
            remedy = " If it is the prompt, end it with a question mark."
        raise FileNotFoundError(f"{word}: no such file; a sound file is expected.{remedy}")
    if re.fullmatch(r"\S*/\S*|\S+\.\w{2,4}", word):
        raise FileNotFoundError(
            f"{word}: no such file or folder. If it is the prompt, write more than one word."
        )
