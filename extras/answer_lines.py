"""Many recordings on the command line: a JSON line for each, and resuming after interruptions."""

import json
import os
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from extras.many_recordings import (
    OUTCOMES,
    TIMESTAMPS,
    Job,
    answer_jobs,
    check_jobs,
    is_too_deep,
    parse_line,
    read_jobs,
)
from plumbing.json_file import check_is_file
from plumbing.processes import is_first_process, num_processes
from plumbing.replace_file import replace_file
from plumbing.terminal import Progress, as_utf_8, refuse
from processor import AudioFlamingo3Processor


def answer_many(args: Namespace, load_model: Callable) -> int:
    """Prints a JSON line for each recording or entry, and returns the exit status.

    args: the command line. load_model: loads the model that args ask for.
    """
    batch_size = args.batch_size
    if batch_size is None:
        batch_size = 8
    if batch_size < 1:
        raise ValueError(f"--batch-size is {batch_size}; at least 1 is expected.")
    processor = AudioFlamingo3Processor.from_pretrained(args.model)
    all_jobs = []
    jobs = []
    output = sys.stdout
    if is_first_process():
        all_jobs = read_jobs(args.prompts, args.recordings, args.prompt, parse_fields(args.fields))
        jobs, output = leave_out_answered(args, all_jobs)
        check_jobs(jobs, args.choose, args.timestamps)
    progress = Progress(len(jobs), args.quiet)
    is_shared = num_processes() > 1 and not args.tensor_parallel

    def answer(share: list[Job]) -> Iterator[Job]:
        model = load_model(args)
        progress.restart()
        shown = None if is_shared else progress  # share_jobs shows that of all processes
        return answer_jobs(
            share, processor, model, batch_size, shown, args.choose, args.timestamps, **args.options
        )

    if num_processes() > 1:
        from extras import parallel

        jobs = parallel.from_first_process(jobs)
    if is_shared:
        answers = parallel.share_jobs(jobs, answer, progress)
    else:
        answers = answer(jobs) if jobs else []
    answered = 0
    cut = 0
    for job in answers:
        write_line(job, output)
        answered += int("response" in job)
        cut += int(job.is_cut)
    if not args.quiet:
        before = len(all_jobs) - len(jobs)
        print(summary_of_many(answered, len(jobs), before, progress.seconds()), file=sys.stderr)
        if cut > 0:
            print(f"ended by the limit, which --max-new-tokens sets: {cut}", file=sys.stderr)
    return 0 if answered == len(jobs) else 1


def summary_of_many(answered: int, asked: int, before: int, seconds: float) -> str:
    if asked == 0:
        return "nothing left to answer; to use other options, choose another file"
    earlier = f" (and {before} before)" if before else ""
    return f"answered {answered} of {asked}{earlier} in {seconds:.1f} s"


def leave_out_answered(args: Namespace, jobs: list[Job]) -> tuple[list[Job], TextIO]:
    """The jobs that are left after --resume and --output, and the file to write their lines to."""
    all_jobs = jobs
    if args.resume and os.path.exists(args.resume):
        jobs = leave_out_answered_in(jobs, args.resume)
        end_cut_line(args.resume)
    if not args.output:
        return jobs, sys.stdout
    output = open_output(args.output, all_jobs)
    return leave_out_answered_in(jobs, args.output), output


def parse_fields(text: str | None) -> dict[str, str]:
    """Parses "audio=NAME,prompt=NAME"; either may be absent. Returns {"audio": NAME, ...}."""
    names = {}
    for pair in (text or "").split(","):
        own, _, name = pair.partition("=")
        is_second = own in names or name in names.values()
        if pair and (own not in ("audio", "prompt") or not name or is_second):
            refuse(f"--fields is {text!r}; audio=NAME,prompt=NAME is expected")
        if pair:
            names[own] = name
    return names


# ---- Lines, and resuming after an interruption ----


# Escaped also in UTF-8: control characters, line separators, and surrogates, which it cannot
# encode. Half an emoji is one, and so is each byte of a file name that is not UTF-8.
ESCAPED_CODES = [*range(127, 160), 0x2028, 0x2029, *range(0xD800, 0xE000)]
ESCAPES = {code: f"\\u{code:04x}" for code in ESCAPED_CODES}


def write_line(job: dict, file: TextIO) -> None:
    """Writes a job to stdout or to an output file, as one line of JSON."""
    is_utf_8 = file.encoding.lower() == "utf-8"
    line = json.dumps(job, ensure_ascii=not is_utf_8)
    print(line.translate(ESCAPES), file=file, flush=True)


def leave_out_answered_in(jobs: list[Job], path: str) -> list[Job]:
    """The jobs without a response among the JSON lines in `path`.

    A job that occurs twice needs two responses.
    """
    check_is_file(Path(path))
    answered = Counter()
    for line in read_lines(path):
        entry = parse_line(line)
        if isinstance(entry, dict) and "response" in entry:
            answered[job_key(entry)] += 1
    remaining = []
    for job in jobs:
        key = job_key(job)
        if answered[key] > 0:
            answered[key] -= 1
        else:
            remaining.append(job)
    return remaining


def read_lines(path: str) -> list[str]:
    """Reads bytes that are not UTF-8 as surrogates, which `replace_file` writes as they were."""
    text = Path(path).read_text(encoding="utf-8-sig", errors="surrogateescape")
    return text.split("\n")


def job_key(entry: dict) -> str:
    """Identifies an entry by its fields, without the outcome.

    An entry may have its own "words"; those of --timestamps come after the response.
    """
    asked = {}
    has_response = False
    for name, value in entry.items():
        has_response = has_response or name == "response"
        is_outcome = name in OUTCOMES or (name == TIMESTAMPS and has_response)
        if not is_outcome and not is_too_deep(value):
            asked[name] = value
    if isinstance(asked.get("audio"), str):
        asked["audio"] = as_utf_8(os.path.normpath(asked["audio"]))  # the same in every locale
    return json.dumps(asked, sort_keys=True)


def open_output(path: str, jobs: list[Job]) -> TextIO:
    """Opens the file of JSON lines at `path`, to append the outcomes of the unanswered `jobs`.

    Removes first what an earlier run left: errors of these jobs, and a last line that was cut off.
    This is done in a copy that then replaces the file, so no response is lost if the program is
    killed. Raises ValueError for a file that contains anything but such lines.
    """
    check_is_file(Path(path))
    path = os.path.realpath(path)  # replace the target of a link, not the link
    keys = {job_key(job) for job in jobs}
    file = open_alone(path)
    lines = read_lines(path)
    kept = []
    for number, line in enumerate(lines, start=1):
        entry = parse_line(line)
        is_outcome = isinstance(entry, dict) and any(name in entry for name in OUTCOMES)
        is_cut_off = entry is None and number == len(lines) and line.startswith("{")
        if line.strip() and not is_outcome and not is_cut_off:
            raise ValueError(f"{path}: line {number} is not an answer; choose another file.")
        if is_outcome and ("response" in entry or job_key(entry) not in keys):
            kept.append(line + "\n")
    if "".join(kept) != "\n".join(lines):
        if sys.platform == "win32":  # it does not replace an open file; elsewhere it stays locked
            file.close()
        replace_file(path, "".join(kept))
        file.close()
        file = open_alone(path)
    return file


def open_alone(path: str) -> TextIO:
    """Opens a file for appending. Raises ValueError while another run has it open this way."""
    file = open(path, "a", encoding="utf-8", newline="\n")
    with suppress(ImportError):  # not on Windows
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path}: another run is writing to it; wait until it ends.") from None
    return file


def end_cut_line(path: str) -> None:
    """If stdout appends to the file `path`, and its last line is cut off, ends that line."""
    with suppress(OSError), open(path, "rb") as file:  # it may be empty, or stdout not a file
        file.seek(-1, os.SEEK_END)
        if os.path.sameopenfile(file.fileno(), sys.stdout.fileno()) and file.read() != b"\n":
            print()
