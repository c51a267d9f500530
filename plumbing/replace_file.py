"""Replaces a file as a whole: whenever the program is killed, the old one or the new one is there."""

import os
import shutil
from pathlib import Path


def replace_file(path: str | Path, text: str) -> None:
    """Writes another file beside it, which then takes its place. A full disk leaves the old one."""
    path = Path(os.path.realpath(path))  # a link stays one
    new = path.with_name(f".{path.name}.new")
    try:
        new.write_text(text, encoding="utf-8", errors="replace")
        if path.exists():
            shutil.copymode(path, new)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
