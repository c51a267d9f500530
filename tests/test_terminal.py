"""The terminal: text from outside cannot steer it, and errors stay in one line."""

import sys

import pytest

import generate
from plumbing.terminal import one_line, printable


def test_control_characters_are_made_visible():
    assert printable("\x1b[2J\x07hi\x9b\x7f") == r"\x1b[2J\x07hi\x9b\x7f"
    assert printable("tab\tline\nü漢🙂") == "tab\tline\nü漢🙂"


def test_a_message_of_several_lines_becomes_one():
    assert one_line("a\n  b\r\n\x1bc") == r"a b \x1bc"


@pytest.mark.parametrize(
    "is_terminal, shown", [(True, r"\x1b[2J\x07hi\x9b"), (False, "\x1b[2J\x07hi\x9b")]
)
def test_an_answer_is_made_printable_in_a_terminal_only(run, clip, monkeypatch, is_terminal, shown):
    def steering_text(processor, steps):
        return ["\x1b[2J\x07", "hi\x9b"]

    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    monkeypatch.setattr(generate.AudioFlamingo3Processor, "stream_text", steering_text)
    _, out, _ = run(clip, "Hm?", "--quiet")
    assert out == shown + "\n"


def test_a_file_name_in_an_error_is_made_printable(run):
    _, _, err = run("\x1b[2Jgone.wav")
    assert err == "error: \\x1b[2Jgone.wav: no such file; a sound file is expected.\n"
