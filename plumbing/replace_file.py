"""Replaces a file atomically: if the program is killed, either the old or the new file remains."""

import os
import shutil
from pathlib import Path


def replace_file(path: str | Path, text: str) -> None:
    """Writes a new file and renames it to `path`. If the disk is full, the old file remains.

    The text may contain bytes that are not UTF-8, as read with errors="surrogateescape".
    """
    path = Path(os.path.realpath(path))  # replace the target of a link, not the link
    new = path.with_name(f".{path.name}.new")
    try:
        new.write_text(text, encoding="utf-8", errors="surrogateescape", newline="\n")
        if path.exists():
            shutil.copymode(path, new)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def give_usual_mode(path: Path) -> None:
    """Gives a file the mode of a new one. safetensors writes files for their owner only."""
    # Asking for the umask would change it for a moment, in all threads.
    new = path.with_name(f".{path.name}.mode")
    new.touch()
    shutil.copymode(new, path)
    new.unlink()
