"""JSON files of a checkpoint, and errors of one line that name the file."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path

from plumbing.download import how_to_complete, how_to_replace


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises OSError or ValueError, naming the file."""
    check_exists(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}).{how_to_replace(path)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a JSON object is expected.")
    return content


def read_fields(path: Path) -> dict:
    """The fields of a JSON file that are not null; none if there is no file."""
    if not path.exists():
        return {}
    return {key: value for key, value in read_json(path).items() if value is not None}


def from_known_keys(cls: type, values: dict):
    """A dataclass, and those in its fields, from a dict that may have other keys, too."""
    known = {}
    for f in fields(cls):
        if f.name in values:
            value = values[f.name]
            is_section = is_dataclass(f.type) and isinstance(value, dict)
            known[f.name] = from_known_keys(f.type, value) if is_section else value
    return cls(**known)


@contextmanager
def errors_naming(path: Path) -> Iterator[None]:
    """Turns any error inside into a ValueError of one line that names `path`."""
    try:
        yield
    except BaseException as error:
        # tiktoken is written in Rust; its PanicException is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = shorten(str(error))
        if str(path) in reason:
            raise ValueError(reason) from None
        if not isinstance(error, (ValueError, RuntimeError, OSError)):
            reason = f"unexpected content ({error!r})"
        raise ValueError(f"{path}: {reason}") from None


def shorten(message: str) -> str:
    """A message in one line. Where it lists many tensors, only the first few."""
    lines = message.splitlines()
    if len(lines) > 6:
        lines = [*lines[:3], f"... and {len(lines) - 3} more."]
    return " ".join(" ".join(line.split())[:1000] for line in lines)


def check_is_file(path: Path) -> None:
    """Refuses what exists and is not a file, for example a pipe, which would block."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: not a file.")


def check_name_is_utf_8(path: Path) -> None:
    """Refuses a name that the safetensors package cannot open."""
    try:
        os.fsencode(path).decode()
    except UnicodeDecodeError:
        raise ValueError(
            f"{path}: not a UTF-8 name, which files of weights need; choose another name."
        ) from None


def check_exists(path: Path) -> None:
    check_is_file(path)
    if not path.exists():
        fault = "no such file"
        if path.is_symlink():
            fault = f"a link to {os.readlink(path)}, which does not exist"
        raise FileNotFoundError(
            f"{path}: {fault}; the checkpoint is not complete.{how_to_complete(path)}"
        )
