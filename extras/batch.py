"""Many recordings: jobs from files, folders and JSON lines, answered in batches of like length.

A job is a dictionary with "audio" (a file) and "prompt"; other fields are kept. Its outcome is an
"answer" or an "error".

    jobs = read_jobs(None, ["recordings/"], "What sound is this?")
    for job in answer_jobs(jobs, processor, model, batch_size=16):
        print(as_json_line(job))
"""

import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from af3 import AudioFlamingo3ForConditionalGeneration
from load_weights import check_is_file
from plumbing.audio_file import AUDIO_SUFFIXES
from plumbing.terminal import Progress, one_line
from processor import AudioFlamingo3Processor, check_plain_prompt

OUTCOMES = ("answer", "error")

# ---- Reading jobs ----


def read_jobs(prompts_file: str | None, names: list[str], prompt: str) -> list[dict]:
    """The lines of a file of JSON lines, if there is one, then each file, or file in a folder, of
    `names`. `prompt` is for those that have none of their own."""
    jobs = []
    if prompts_file:
        for number, entry in enumerate(read_json_lines(prompts_file), start=1):
            job = {"prompt": prompt} | entry
            check_job(job, number, prompts_file)
            jobs.append(job)
    for name in names:
        for file in files_in(name):
            jobs.append({"audio": file, "prompt": prompt})
    return jobs


def files_in(name: str) -> list[str]:
    """The recordings in a folder and its subfolders, sorted; of a file, that file."""
    if not os.path.isdir(name):
        return [name]
    files = []
    for path in Path(name).rglob("[!.]*"):
        if path.suffix.lower() in AUDIO_SUFFIXES and path.is_file():
            files.append(str(path))
    if not files:
        raise ValueError(f"{name}: no sound files inside.")
    return sorted(files)


def read_json_lines(path: str) -> list[dict]:
    """The object in each line; {} for a line that has none, because it was cut off for example."""
    check_is_file(Path(path))
    text = Path(path).read_text(encoding="utf-8-sig", errors="replace")
    objects = []
    for line in text.split("\n"):
        if not line.strip():
            continue
        content = None
        with suppress(ValueError, RecursionError):
            content = json.loads(line)
        objects.append(content if isinstance(content, dict) else {})
    return objects


def check_job(job: dict, number: int, path: str) -> None:
    good = isinstance(job.get("audio"), str) and isinstance(job["prompt"], str)
    if not good or any(outcome in job for outcome in OUTCOMES):
        raise ValueError(
            f'{path}: entry {number} must be an object with "audio", a file, '
            'and no "answer" or "error".'
        )


# ---- Answering ----


def answer_jobs(
    jobs: list[dict],
    processor: AudioFlamingo3Processor,
    model: AudioFlamingo3ForConditionalGeneration,
    batch_size: int = 8,
    progress: Progress | None = None,
    **options,
) -> Iterator[dict]:
    """The jobs with their "answer" or "error", in the order given; options are `generate`'s.

    The recordings of a few batches are loaded at a time, and those of like length answered
    together, so that little is padded. A job that fails does not stop the others.
    """
    group_size = 4 * batch_size
    for start in range(0, len(jobs), group_size):
        group = jobs[start : start + group_size]
        loaded = load_recordings(group, processor)
        loaded.sort(key=lambda recording_and_job: len(recording_and_job[0]))
        for first in range(0, len(loaded), batch_size):
            answer_batch(loaded[first : first + batch_size], processor, model, options)
            if progress:
                remaining = max(0, len(loaded) - first - batch_size)
                progress.show(start + len(group) - remaining)
        if progress:
            progress.clear()
        yield from group


def load_recordings(
    jobs: list[dict], processor: AudioFlamingo3Processor
) -> list[tuple[Tensor, dict]]:
    """Each job with its waveform; one whose file cannot be read gets its "error" instead."""
    loaded = []
    for job in jobs:
        try:
            with warnings.catch_warnings(record=True) as caught:
                waveform = processor.to_waveform(job["audio"])
            loaded.append((waveform, job))
            for warning in caught:
                warn_about(job["audio"], str(warning.message))
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            job["error"] = one_line(error)
    return loaded


def warn_about(file: str, message: str) -> None:
    """Warns with the file's name, which is needed where there are many."""
    if file not in message:
        message = f"{file}: {message}"
    warnings.warn(message)


def answer_batch(
    batch: list[tuple[Tensor, dict]],
    processor: AudioFlamingo3Processor,
    model: AudioFlamingo3ForConditionalGeneration,
    options: dict,
) -> None:
    """Gives each job its outcome. Where a batch fails, each of its jobs is tried alone."""
    try:
        prompts = []
        for _, job in batch:
            check_plain_prompt(job["prompt"])
            prompts.append(job["prompt"])
        inputs = processor(prompts, [waveform for waveform, _ in batch]).to(model.device)
        ids = model.generate(**inputs, **options)
        new_ids = ids[:, inputs["input_ids"].shape[1] :]
        answers = processor.batch_decode(new_ids, skip_special_tokens=True)
        for (_, job), answer in zip(batch, answers):
            job["answer"] = answer
        return
    except (ValueError, MemoryError, RuntimeError) as error:
        reason = one_line(error)
    # Not inside `except`, where the error would keep the failed batch's tensors in memory.
    if len(batch) == 1:
        batch[0][1]["error"] = reason
        return
    for waveform_and_job in batch:
        answer_batch([waveform_and_job], processor, model, options)


# ---- Writing answers, and going on after an interruption ----


def as_json_line(job: dict) -> str:
    """JSON without control characters, in the encoding of stdout."""
    can_write_all = sys.stdout.encoding.lower() == "utf-8"
    line = json.dumps(job, ensure_ascii=not can_write_all)
    return line.translate({code: f"\\u{code:04x}" for code in range(127, 160)})


def leave_out_answered(jobs: list[dict], path: str) -> list[dict]:
    """The jobs without an answer among the JSON lines in `path`.

    A job that is there twice needs two answers.
    """
    answered = Counter()
    for line in read_json_lines(path):
        if "answer" in line and isinstance(line.get("audio"), str):
            answered[job_key(line)] += 1
    remaining = []
    for job in jobs:
        key = job_key(job)
        if answered[key] > 0:
            answered[key] -= 1
        else:
            remaining.append(job)
    return remaining


def job_key(job: dict) -> str:
    """A job without its outcome, to recognise it by."""
    asked = {name: value for name, value in job.items() if name not in OUTCOMES}
    asked["audio"] = os.path.normpath(job["audio"])
    return json.dumps(asked, sort_keys=True)


def end_cut_line(path: str) -> None:
    """If stdout appends to the file `path`, and its last line is cut off, ends that line."""
    with suppress(OSError), open(path, "rb") as file:  # it may be empty, and stdout no file
        file.seek(-1, os.SEEK_END)
        if os.path.sameopenfile(file.fileno(), sys.stdout.fileno()) and file.read() != b"\n":
            print()
