"""The terminal: untrusted text cannot manipulate it, and errors are one line."""

import os
import sys
from types import SimpleNamespace

import pytest

import generate
from plumbing import terminal
from plumbing.terminal import as_utf_8, one_line, printable


def test_control_characters_are_escaped():
    assert printable("\x1b[2J\x07hi\x9b\x7f") == r"\x1b[2J\x07hi\x9b\x7f"
    assert printable("tab\tline\nü漢🙂") == "tab\tline\nü漢🙂"


def test_a_message_of_several_lines_becomes_one():
    assert one_line("a\n  b\r\n\x1bc") == r"a b \x1bc"


@pytest.mark.parametrize(
    "is_terminal, shown", [(True, r"\x1b[2J\x07hi\x9b"), (False, "\x1b[2J\x07hi\x9b")]
)
def test_an_answer_is_escaped_only_in_a_terminal(run, clip, monkeypatch, is_terminal, shown):
    def steering_text(processor, steps):
        return ["\x1b[2J\x07", "hi\x9b"]

    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    monkeypatch.setattr(generate.AudioFlamingo3Processor, "stream_text", steering_text)
    _, out, _ = run(clip, "Hm?", "--quiet")
    assert out == shown + "\n"


def test_a_file_name_in_an_error_is_escaped(run):
    _, _, err = run("\x1b[2Jgone.wav")
    assert err == "error: \\x1b[2Jgone.wav: no such file; a sound file is expected.\n"


def test_a_single_recording_with_a_name_that_is_not_utf_8_is_answered(run, odd_clip):
    status, out, _ = run(odd_clip, "Hi", "--max-new-tokens", 1)
    assert (status, out.count("\n")) == (0, 1)
    os.truncate(odd_clip, 30000)
    _, _, err = run(odd_clip, "Hi", "--max-new-tokens", 1, "--quiet")
    assert err.startswith("warning: ") and "caf\\udce9.wav: truncated" in err


def test_a_name_that_is_not_utf_8_can_be_reported_to_a_closed_stderr(monkeypatch, run, odd_clip):
    os.truncate(odd_clip, 30000)  # so that there is a warning
    monkeypatch.setattr(sys, "stderr", None)
    _, out, _ = run(odd_clip, "Hi", "--max-new-tokens", 1, "--batch-size", 1)
    assert '"response"' in out


@pytest.mark.parametrize(
    "text, decoded",
    [
        ("h\udcc3\udcb6r ü", "hör ü"),  # in the C locale
        ("caf\udce9", "caf\udce9"),  # not UTF-8
        ("\ud83d \udcc3\udcb6", "\ud83d \udcc3\udcb6"),  # half an emoji
    ],
)
def test_bytes_that_the_locale_lacks_are_decoded_if_they_are_utf_8(text, decoded):
    assert as_utf_8(text) == decoded


def test_a_warning_is_written_at_once_so_that_those_of_two_threads_do_not_mix(monkeypatch):
    written = []
    stderr = SimpleNamespace(isatty=lambda: False, write=written.append)
    monkeypatch.setattr(sys, "stderr", stderr)
    terminal.print_warning("a\nb")
    terminal.print_error(ValueError("c"))
    assert [text for text in written if text] == ["warning: a b\n", "error: c\n"]


def test_a_missing_package_is_reported_in_one_line(capsys):
    with pytest.raises(SystemExit) as left:
        terminal.check_packages(["os", "no_such_package"])
    assert left.value.code == 2
    assert capsys.readouterr().err == (
        "error: the package no_such_package is not installed; "
        "as README.md says, activate .venv or install requirements.txt\n"
    )


# ---- Thoughts ----

DIM = "\x1b[2m"
NORMAL = "\x1b[0m"


def pieces(text, size):
    return [text[start : start + size] for start in range(0, len(text), size)]


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_a_thought_is_dimmed_however_it_is_split(size):
    answer = "So <thin>: <think>a < b</think> b. <think>c</think> d<"
    dimmed = f"So <thin>: {DIM}<think>a < b</think>{NORMAL} b. {DIM}<think>c</think>{NORMAL} d<"
    assert "".join(terminal.dim_thoughts(pieces(answer, size))) == dimmed


def test_a_thought_that_does_not_end_is_dimmed_to_the_end_of_the_answer():
    assert "".join(terminal.dim_thoughts(["<think>", "well"])) == f"{DIM}<think>well{NORMAL}"


def test_text_is_shown_as_soon_as_it_cannot_be_part_of_a_tag():
    parts = terminal.dim_thoughts(["a", " <", "b"])
    assert next(parts) == "a"
    assert next(parts) == " "
    assert next(parts) == "<b"


def test_thoughts_are_unchanged_in_a_pipe(capsys):
    terminal.print_as_it_comes(["<think>a</think>", " b"])
    assert capsys.readouterr().out == "<think>a</think> b\n"


def test_thoughts_are_dimmed_in_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal.print_as_it_comes(["<think>a</think>", " b"])
    assert capsys.readouterr().out == f"{DIM}<think>a</think>{NORMAL} b\n"
