"""Puts deliberate faults into the four files of the model, one at a time, and runs the tests.

    python tools/mutate.py                      all edits in tools/mutations.txt
    python tools/mutate.py --only load_weights  those with this in their file, rule or text

Prints a line for each edit, with the first test that fails, and how many were noticed by tests/spec
and at all. Tests that do not end count as failed. Needs git, and `timeout` of GNU coreutils.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from plumbing.terminal import exit_with

# Arguments of pytest, and the seconds after which it is stopped, with status -9. In a copy, one
# edit no longer fits, so the test that they all do is left out.
SPEC = ("tests/spec",)
OTHERS = ("tests", "--ignore=tests/spec", "--ignore-glob=*test_mutate.py")
SECONDS = {SPEC: 600, OTHERS: 3600}
# Its program says, after the tests, which file they have imported as the module argv[1].
PYTEST = """import sys, pytest
status = pytest.main(sys.argv[2:])
print("imported:", getattr(sys.modules.get(sys.argv[1]), "__file__", None))
sys.exit(status)"""

Edit = namedtuple("Edit", "file rule old new")  # the rule that it breaks; text before and after
NO_FAULT = Edit("af3.py", "No rule.", "# ---- Whole model ----", "# ---- The whole model ----")


def read_edits() -> list[Edit]:
    """The edits in mutations.txt, which begins with a description of its form."""
    edits = []
    text = (ROOT / "tools" / "mutations.txt").read_text(encoding="utf-8")
    for section in text.split("\n# ")[1:]:
        heading, *paragraphs = section.strip().split("\n\n")
        for paragraph in paragraphs:
            rule, *lines = paragraph.split("\n")
            old = "\n".join(line[2:] for line in lines if line.startswith("- "))
            new = "\n".join(line[2:] for line in lines if line.startswith("+ "))
            edits.append(Edit(heading.partition(":")[0], rule, old, new))
    return edits


def edited_source(edit: Edit) -> str:
    """The file with the edit. Raises ValueError if it does not have the old text once."""
    source = (ROOT / edit.file).read_text(encoding="utf-8")
    if source.count(edit.old) != 1 or edit.old == edit.new:
        raise ValueError(f"{edit.file} needs this text once: {edit.old!r} ({edit.rule})")
    return source.replace(edit.old, edit.new)


def first_failure(edit: Edit, tests: tuple) -> str | None:
    """The first test that fails in a copy of the repository with the edit; None if all pass."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder).resolve() / "project"
        for name in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
        (copy.parent / "shared").symlink_to(ROOT.parent / "shared")  # where tests look for data
        edited = copy / edit.file
        edited.write_text(edited_source(edit), encoding="utf-8")
        command = ["timeout", "--signal=KILL", str(SECONDS[tests]), sys.executable, "-c", PYTEST]
        command += [edited.stem, "-xq", *tests, "-p", "no:cacheprovider", f"--basetemp={folder}/t"]
        result = subprocess.run(command, cwd=copy, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT)
    output = result.stdout.decode(errors="replace")
    imported = re.search("^imported: (.*)", output, re.MULTILINE)
    if imported and imported[1] not in ("None", str(edited)):
        raise ValueError(f"{imported[1]} was tested, and not the copy.")
    failed = re.search("^(?:FAILED|ERROR) (.*?)(?: - .*)?$", output, re.MULTILINE)
    reason = failed[1] if failed else f"status {result.returncode}: {output.strip()[-200:]!r}"
    return reason if result.returncode else None


def noticed_by(edit: Edit, groups: list[tuple]) -> tuple | None:
    """The first group of tests in which one fails; prints which."""
    for tests in groups:
        if failed := first_failure(edit, tests):
            print(f"{edit.file}: {edit.rule} -> {failed}", flush=True)
            return tests
    print(f"{edit.file}: {edit.rule} -> NOT NOTICED", flush=True)


def print_rates(edits: list[Edit], noticed: list) -> None:
    kinds = ["(rounding)" if "(rounding)" in edit.rule else edit.file for edit in edits]
    for row in [*dict.fromkeys(kinds), "all"]:
        groups = [tests for tests, kind in zip(noticed, kinds) if row in (kind, "all")]
        spec = groups.count(SPEC) / len(groups)
        total = 1 - groups.count(None) / len(groups)
        print(f"{row}: {len(groups)} edits, {spec:.1%} noticed by tests/spec, {total:.1%} at all")


def main() -> int | None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="edits with this text")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="edits at a time")
    parser.add_argument("--spec-only", action="store_true", help="run only tests/spec")
    parser.add_argument("--check", action="store_true", help="only see whether the edits fit")
    args = parser.parse_args()
    edits = [edit for edit in read_edits() if args.only in "\n".join(edit)]
    for edit in edits:
        edited_source(edit)
    groups = [SPEC] if args.spec_only else [SPEC, OTHERS]
    if args.check or not edits or noticed_by(NO_FAULT, groups):
        return 0 if args.check else 1  # 1: no edit has the text, or the tests fail without any
    with ThreadPoolExecutor(args.jobs) as pool:
        print_rates(edits, list(pool.map(noticed_by, edits, [groups] * len(edits))))


if __name__ == "__main__":
    exit_with(main)
