"""The system message in a checkpoint's chat_template.jinja.

Nothing else differs between the published templates, so no template engine is needed.
"""

import re
from pathlib import Path

from plumbing.json_file import check_is_file, errors_naming


def read_system_message(folder: Path, default: str) -> str:
    """The system message of a conversation that has none of its own."""
    path = folder / "chat_template.jinja"
    check_is_file(path)
    if not path.exists():
        return default
    with errors_naming(path):
        template = path.read_text(encoding="utf-8")
    # Inside a string of the template, the newline is written as a backslash and an n.
    message = re.search(r"<\|im_start\|>system(?:\n|\\n)(.*?)<\|im_end\|>", template, re.DOTALL)
    if message is None or re.search(r"\{[{%]", message[1]):  # {{ and {% are Jinja's
        raise ValueError(f"{path}: no system message as plain text inside; it is not supported.")
    return message[1]
