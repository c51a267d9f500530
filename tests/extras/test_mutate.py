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
    """A file with two numbers, and a test of one of them."""
    if not shutil.which("git") or not shutil.which("timeout"):
        pytest.skip("git or timeout is not installed")
    (tmp_path / "tests" / "spec").mkdir(parents=True)
    (tmp_path / "af3.py").write_text("ONE = 1\nSECONDS = 0\n# a comment\n")
    (tmp_path / "tests" / "spec" / "test_one.py").write_text(
        "import time, af3\ntime.sleep(af3.SECONDS)\ndef test_one():\n    assert af3.ONE == 1\n"
    )
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "."], cwd=tmp_path, check=True)
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    return tmp_path


def test_it_prints_which_test_notices_a_fault_and_which_faults_none_notices(
    small_repository, monkeypatch, capsys
):
    noticed = Edit("af3.py", "One is 1.", "ONE = 1", "ONE = 2")
    not_noticed = Edit("af3.py", "It waits for nothing.", "SECONDS = 0", "SECONDS = 0.01")
    monkeypatch.setattr(mutate, "read_edits", lambda: [noticed, not_noticed])
    monkeypatch.setattr(mutate, "NO_FAULT", Edit("af3.py", "No rule.", "a comment", "the comment"))
    monkeypatch.setattr(sys, "argv", ["mutate.py", "--spec-only"])
    mutate.main()
    assert capsys.readouterr().out.splitlines() == [
        "af3.py: No rule. -> NOT NOTICED",
        "af3.py: One is 1. -> tests/spec/test_one.py::test_one",
        "af3.py: It waits for nothing. -> NOT NOTICED",
        "af3.py: 2 edits, 50.0% noticed by tests/spec, 50.0% at all",
        "all: 2 edits, 50.0% noticed by tests/spec, 50.0% at all",
    ]


def test_tests_that_do_not_end_are_stopped_and_count_as_failed(small_repository, monkeypatch):
    monkeypatch.setitem(mutate.SECONDS, SPEC, 1)
    edit = Edit("af3.py", "It waits for nothing.", "SECONDS = 0", "SECONDS = 600")
    assert "status -9" in mutate.first_failure(edit, SPEC)


def test_a_module_that_is_not_the_copys_is_refused(small_repository, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.copy(small_repository / "af3.py", elsewhere)
    test = small_repository / "tests" / "spec" / "test_one.py"
    test.write_text(f"import sys\nsys.path.insert(0, {str(elsewhere)!r})\n{test.read_text()}")
    with pytest.raises(ValueError, match="was tested, and not the copy"):
        mutate.first_failure(Edit("af3.py", "One is 1.", "ONE = 1", "ONE = 2"), SPEC)
