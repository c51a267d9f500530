"""The system message in a checkpoint's chat template.

The published templates differ in nothing else, so no template engine is needed.
"""

import re
from pathlib import Path

from plumbing.json_file import check_is_file, errors_naming, read_json


def read_system_message(folder: Path, processor_config: dict, default: str) -> str:
    """The system message of a conversation that has none of its own.

    processor_config: the fields of processor_config.json, one of the places for a template.
    """
    path, template = find_template(folder, processor_config)
    if template is None:
        return default
    # Inside a string of the template, the newline is written as a backslash and an n.
    message = re.search(r"<\|im_start\|>system(?:\n|\\n)(.*?)<\|im_end\|>", template, re.DOTALL)
    if message is None or re.search(r"\{[{%]", message[1]):  # {{ and {% are Jinja's
        raise ValueError(f"{path}: no system message as plain text inside; it is not supported.")
    check_order(template, path)
    return message[1]


def find_template(folder: Path, processor_config: dict) -> tuple[Path, str | None]:
    """The template and its file, in the order in which transformers looks for it."""
    path = folder / "processor_config.json"
    template = processor_config.get("chat_template")
    if template is None and (folder / "chat_template.json").exists():
        path = folder / "chat_template.json"
        template = read_json(path).get("chat_template")
    if template is None:
        path = folder / "chat_template.jinja"
        check_is_file(path)
        if path.exists():
            with errors_naming(path):
                template = path.read_text(encoding="utf-8")
    if not isinstance(template, (str, type(None))):
        raise ValueError(f"{path}: chat_template is {template!r:.60}; one text is expected.")
    return path, template


def check_order(template: str, path: Path) -> None:
    """Refuses a template that does not place the audio of a message before its text.

    In a template that does, the first thing printed after the last <sound> of a message is its
    text, in the same branch.
    """
    if "<sound>" not in template:
        return  # it is for text alone
    following = template.rpartition("<sound>")[2].split("<|im_end|>")[0]
    following = re.sub(r"^[^{}]*-?\}\}", "", following)  # the end of {{ '<sound>' }}
    before_text, prints_text, _ = following.partition("{{")
    if not prints_text or re.search(r"\{%-?\s*el(if|se)\b", before_text):
        raise ValueError(
            f"{path}: chat_template does not place audio before text; it is not supported."
        )
