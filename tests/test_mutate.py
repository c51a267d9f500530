"""The deliberate faults of tools/mutate.py fit the files that they are for, and are reported."""

import ast
import shutil
import subprocess
import sys

import pytest

import mutate
from mutate import SPEC, Edit


def test_each_fault_replaces_a_text_that_its_file_has_once_and_is_valid_python():
    edits = mutate.read_edits()
    assert len(edits) >= 120
    for edit in edits:
        ast.parse(mutate.edited_source(edit))


def test_each_fault_is_in_one_of_the_four_files_and_breaks_a_rule_of_its_own():
    edits = mutate.read_edits()
    files = {"af3.py", "processor.py", "load_weights.py", "generate.py"}
    rules = [edit.rule for edit in edits]
    assert {edit.file for edit in edits} == files
    assert [rule for rule in rules if rules.count(rule) > 1] == []


@pytest.mark.parametrize("old", ["no such text", "import", "# ---- Encoder"])
def test_a_fault_that_does_not_fit_is_refused(old):
    with pytest.raises(ValueError, match="af3.py needs this text once: .*A rule"):
        mutate.edited_source(Edit("af3.py", "A rule.", old, "# ---- Encoder"))


@pytest.fixture
def small_repository(tmp_path, monkeypatch):
    """One file, with one test of it."""
    if not shutil.which("git") or not shutil.which("timeout"):
        pytest.skip("git or timeout is not installed")
    (tmp_path / "tests" / "spec").mkdir(parents=True)
    (tmp_path / "af3.py").write_text("ONE = 1\nTWO = 2\nTHREE = 3\nSECONDS = 0\n")
    (tmp_path / "tests" / "spec" / "test_one.py").write_text(
        "import time, af3\ndef test_one():\n    time.sleep(af3.SECONDS)\n    assert af3.ONE == 1\n"
    )
    (tmp_path / "tests" / "test_two.py").write_text(
        "import af3\ndef test_two():\n    assert af3.TWO == 2\n"
    )
    for command in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    return tmp_path


def test_it_prints_the_first_test_that_fails_and_what_none_has_noticed(
    small_repository, monkeypatch, capsys
):
    numbers = ["ONE = 1", "TWO = 2", "THREE = 3"]
    edits = [Edit("af3.py", f"{old}.", old, f"{old}0") for old in numbers]
    monkeypatch.setattr(mutate, "read_edits", lambda: edits)
    monkeypatch.setattr(mutate, "NO_FAULT", Edit("af3.py", "None.", "SECONDS = 0", "SECONDS = 0.0"))
    monkeypatch.setattr(sys, "argv", ["mutate.py"])
    mutate.main()
    assert capsys.readouterr().out.splitlines()[1:] == [
        "af3.py: ONE = 1. -> tests/spec/test_one.py::test_one",
        "af3.py: TWO = 2. -> tests/test_two.py::test_two",
        "af3.py: THREE = 3. -> NOT NOTICED",
        "af3.py: 3 edits, 33.3% noticed by tests/spec, 66.7% at all",
        "all: 3 edits, 33.3% noticed by tests/spec, 66.7% at all",
    ]


def test_tests_that_do_not_end_are_stopped_and_count_as_failed(small_repository, monkeypatch):
    monkeypatch.setitem(mutate.SECONDS, SPEC, 1)
    edit = Edit("af3.py", "A rule.", "SECONDS = 0", "SECONDS = 600")
    assert "status -9" in mutate.first_failure(edit, SPEC)


def test_a_module_from_elsewhere_is_refused(small_repository, monkeypatch, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "af3.py").write_text("ONE = 1\nSECONDS = 0\n")
    (small_repository / "conftest.py").write_text(
        f"import sys\nsys.path.insert(0, {str(elsewhere)!r})\n"
    )
    subprocess.run(["git", "add", "."], cwd=small_repository, check=True)
    with pytest.raises(ValueError, match="was tested, and not the copy"):
        mutate.first_failure(Edit("af3.py", "A rule.", "ONE = 1", "ONE = 2"), SPEC)
