"""Windows and macOS, as far as another platform can imitate them."""

import ast
import io
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest

from extras import answer_lines
from peak_memory import peak_bytes
from places import ROOT, TINY
from plumbing import terminal

FOLDERS = ["plumbing", "extras", "tools", "tiny"]
FILES = [*ROOT.glob("*.py"), *(path for name in FOLDERS for path in (ROOT / name).glob("*.py"))]

# ---- Text ----


def opens_text_without_encoding(call):
    """Whether a call opens, reads or writes a text file in the encoding of the platform."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if name not in ("open", "read_text", "write_text", "fdopen", "TextIOWrapper"):
        return False
    modes = [word.value for word in call.args if isinstance(word, ast.Constant)]
    is_binary = name == "open" and any("b" in str(mode) for mode in modes[-1:])
    is_wave = ast.unparse(call.func) == "wave.open"
    return not (is_binary or is_wave or any(word.arg == "encoding" for word in call.keywords))


def test_text_files_have_an_encoding():
    without = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and path.name != "endure.py":  # which needs Linux
                if opens_text_without_encoding(node):
                    without.append(f"{path}: line {node.lineno}")
    assert len(FILES) > 40
    assert without == []


@pytest.mark.parametrize("code", ["open(name)", "open(name, 'w')", "path.read_text()"])
def test_a_call_without_an_encoding_is_noticed(code):
    assert opens_text_without_encoding(ast.parse(code).body[0].value)


def test_a_warning_without_a_stderr_may_have_any_characters(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(terminal.warnings, "showwarning", None)
    monkeypatch.setattr(terminal.warnings, "filters", [])
    terminal.prepare_streams()
    print("caf\udce9 漢", file=sys.stderr, flush=True)


# ---- Modules that not every platform has ----

ANSWER_WITHOUT = """
import sys
import numpy, torch
from torch.distributed import tensor
for name in ("resource", "fcntl", "termios", "tty", "pty", "pwd", "grp", "readline"):
    sys.modules[name] = None
import generate
from extras import chat, command_line, explain_page, finetune, many_recordings, parallel, score
sys.path.append("tools")
import bench, official, random_checkpoint, throughput, timestamps
clip, output, page = sys.argv[1:]
for options in (["--output", output], ["--chat"], ["--explain", page]):
    sys.argv = ["generate.py", clip, *options]
    if generate.main() != 0:
        sys.exit(f"{options} failed")
"""


def test_programs_run_without_the_modules_that_windows_lacks(tmp_path):
    clip = TINY / "samples" / "rain.wav"
    files = [clip, tmp_path / "out.jsonl", tmp_path / "page.html"]
    command = [sys.executable, "-c", ANSWER_WITHOUT, *map(str, files)]
    streams = {"input": "What sound is this?\n", "capture_output": True, "text": True}
    result = subprocess.run(command, cwd=ROOT, **streams)
    assert result.returncode == 0, result.stderr
    assert all(file.exists() for file in files)


@pytest.mark.parametrize("platform, expected", [("linux", 3_000_000), ("darwin", 3000)])
def test_peak_memory_is_in_bytes(monkeypatch, platform, expected):
    """The system gives kB on Linux (of 1000 here) and bytes on macOS."""
    usage = SimpleNamespace(ru_maxrss=3000)
    resource = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda _: usage)
    monkeypatch.setitem(sys.modules, "resource", resource)
    monkeypatch.setattr(sys, "platform", platform)
    assert peak_bytes() == pytest.approx(expected, rel=0.03)


def test_peak_memory_is_unknown_on_windows(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    assert math.isnan(peak_bytes())


def test_chat_completes_file_names_with_both_kinds_of_readline(monkeypatch, run, clip):
    bound = []
    for description in ("GNU readline", "uses libedit"):
        module = SimpleNamespace(__doc__=description, parse_and_bind=bound.append)
        module.set_completer_delims = lambda _: None
        monkeypatch.setitem(sys.modules, "readline", module)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
        assert run("--chat", clip, model=TINY)[0] == 0
    assert bound == ["tab: complete", "bind ^I rl_complete"]


# ---- Files that are open ----


def test_windows_replaces_the_output_only_after_it_is_closed(monkeypatch, tmp_path):
    opened = []

    def replace_file(path, text):
        assert all(file.closed for file in opened)

    def open_alone(path):
        opened.append(open(path, "a", encoding="utf-8"))
        return opened[-1]

    monkeypatch.setattr(answer_lines, "replace_file", replace_file)
    monkeypatch.setattr(answer_lines, "open_alone", open_alone)
    monkeypatch.setattr(sys, "platform", "win32")
    (tmp_path / "out.jsonl").write_text('{"response": "cut of')
    answer_lines.open_output(str(tmp_path / "out.jsonl"), []).close()
    assert len(opened) == 2
