"""Many recordings: jobs from files, folders and JSON, answered in batches of similar length.

A job is a request: a dictionary with "audio" (a file, or a list of files), "prompt" and any
other fields, which are kept. Its outcome is a "response" or an "error".

    jobs = read_jobs(None, ["recordings/"], "What sound is this?")
    for job in answer_jobs(jobs, processor, model, batch_size=16):
        print(job)
"""

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from af3 import AudioFlamingo3ForConditionalGeneration
from extras.alignment import UNCLEAR, align, as_fields
from plumbing.audio_file import AUDIO_SUFFIXES, check_is_no_url
from plumbing.check_inputs import check_length, check_plain_prompt
from plumbing.json_file import check_is_file
from plumbing.terminal import Progress, describe_error
from plumbing.timeline import find_gaps
from plumbing.transformers_conventions import Batch
from processor import N_SAMPLES, SAMPLE_RATE, AudioFlamingo3Processor, audio_frame_count

OUTCOMES = ("response", "error")
TIMESTAMPS = "words"  # the field for timestamps
MAX_DEPTH = 100  # of a field; Python writes and exchanges only a few hundred levels
OWN_FIELDS = {"audio": "audio", "prompt": "prompt"}  # the default names of an entry's fields

# ---- Reading jobs ----


class Job(dict):
    """The fields of an entry, as they will be written, with their parsed values as attributes."""

    def __init__(self, entry: dict, recordings: list[str], prompt: str, place: str):
        super().__init__(entry)
        self.recordings = recordings  # files
        self.prompt = prompt
        self.place = place  # for errors: "questions.jsonl: line 3"
        self.choices = entry.get("choices", [])
        self.is_cut = False  # whether max_new_tokens ended the answer

    def is_done(self) -> bool:
        return any(outcome in self for outcome in OUTCOMES)


def read_jobs(
    prompts_file: str | None, names: list[str], prompt: str, fields: dict[str, str] | None = None
) -> list[Job]:
    """Jobs for the entries of a JSON file, if given, and for the files and folders in `names`.

    `prompt` is for entries without one. `fields` maps "audio" and "prompt" to the names that these
    fields have in the entries.
    """
    jobs = []
    if prompts_file:
        entries = read_entries(prompts_file)
        check_fields(fields or {}, entries, prompts_file)
        names_of_fields = OWN_FIELDS | (fields or {})
        faults = []
        for place, entry in entries:
            try:
                jobs.append(new_job(entry, prompt, names_of_fields, place, prompts_file))
            except ValueError as error:
                faults.append(str(error))
        check_no_faults(faults)
        warn_about_missing_prompts(entries, names_of_fields["prompt"], prompt, prompts_file)
    seen = set()
    for name in names:
        for file in files_in(name):
            if os.path.realpath(file) in seen:
                continue  # each file is used once
            seen.add(os.path.realpath(file))
            jobs.append(Job({"audio": file, "prompt": prompt}, [file], prompt, file))
    return jobs


def check_no_faults(faults: list[str]) -> None:
    """Raises ValueError with the first few faults in the entries of a file, if there are any."""
    shown = " ".join(faults[:5])
    more = len(faults) - 5
    if more > 0:
        shown += f" And {more} more lines are wrong."
    if faults:
        raise ValueError(shown)


def warn_about_missing_prompts(entries: list, field: str, prompt: str, prompts_file: str) -> None:
    """If the field's name is mistyped, the speech would otherwise be transcribed silently."""
    missing = sum(field not in entry for _, entry in entries)
    if missing and prompt == AudioFlamingo3Processor.default_transcription_prompt:
        warnings.warn(
            f'{prompts_file}: entries without "{field}": {missing} of {len(entries)}; '
            f'they are asked "{prompt}"'
        )


def check_fields(fields: dict[str, str], entries: list, prompts_file: str) -> None:
    """Refuses a field name that no entry has: it is probably mistyped."""
    for name in fields.values():
        if not any(isinstance(entry, dict) and name in entry for _, entry in entries):
            raise ValueError(f'{prompts_file}: no entry has the field "{name}" of --fields.')


def read_entries(path: str) -> list[tuple[str, object]]:
    """The entries of a JSON array or of JSON lines, each after its place: "FILE: line 3".

    "-" is standard input.
    """
    if path != "-":
        check_is_file(Path(path))
        content = Path(path).read_bytes()
    elif sys.stdin is not None:
        content = sys.stdin.buffer.read()
    else:
        raise ValueError("Standard input is closed; JSON lines are expected there.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}: line {line} is not UTF-8; save the file as UTF-8.") from None
    entries = []
    if text.lstrip().startswith("["):
        for number, entry in enumerate(parse_json(text, path), start=1):
            entries.append((f"{path}: entry {number}", entry))
    else:
        for number, line in enumerate(text.split("\n"), start=1):
            place = f"{path}: line {number}"
            if line.strip():
                entries.append((place, parse_json(line, place)))
    if not entries:
        raise ValueError(f"{path}: no entries inside.")
    return entries


def parse_json(text: str, place: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not valid JSON ({error}).") from None


def parse_line(line: str):
    """The value of a line of JSON, or None."""
    with suppress(ValueError, RecursionError):
        return json.loads(line)
    return None


def new_job(entry, prompt: str, fields: dict[str, str], place: str, prompts_file: str) -> Job:
    """Makes a job from an entry. Raises ValueError, with its place, if the entry is invalid."""
    if not isinstance(entry, dict):
        raise ValueError(f"{place}: a JSON object is expected.")
    audio_field = fields["audio"]
    prompt_field = fields["prompt"]
    if audio_field not in entry:
        raise ValueError(f'{place}: it has no "{audio_field}", the file of the recording.')
    audio = entry[audio_field]
    recordings = audio if isinstance(audio, list) else [audio]
    if not recordings or not all(isinstance(name, str) and name for name in recordings):
        raise ValueError(
            f'{place}: "{audio_field}" is {json.dumps(audio)}; '
            "a file's name, or a list of names, is expected."
        )
    for name in recordings:
        check_is_no_url(name, f"{place}: ")
    entry = {**entry}
    entry.setdefault(prompt_field, prompt)
    if not isinstance(entry[prompt_field], str):
        value = json.dumps(entry[prompt_field])
        raise ValueError(f'{place}: "{prompt_field}" is {value}; text is expected.')
    for outcome in OUTCOMES:
        if outcome in entry:
            raise ValueError(
                f'{place}: it has "{outcome}", a field of the output; rename or remove it.'
            )
    choices = entry.get("choices", [])
    if not isinstance(choices, list) or not all(
        choice and isinstance(choice, str) for choice in choices
    ):
        value = json.dumps(choices)
        raise ValueError(f'{place}: "choices" is {value}; a list of texts is expected.')
    recordings = [find_beside(as_file_name(name), prompts_file) for name in recordings]
    too_deep = [name for name, value in entry.items() if is_too_deep(value)]
    for name in too_deep:
        del entry[name]
    job = Job(entry, recordings, entry[prompt_field], place)
    if too_deep:
        job["error"] = (
            f'{place}: "{too_deep[0]}" has more than {MAX_DEPTH} lists or objects inside each '
            "other; leave it out."
        )
    return job


def is_too_deep(value) -> bool:
    """Whether more than MAX_DEPTH lists or objects are nested in a value of JSON."""
    depth = 0
    level = [value]
    while level and depth <= MAX_DEPTH:
        inner = []
        for item in level:
            if isinstance(item, dict):
                inner += item.values()
            elif isinstance(item, list):
                inner += item
        level = inner
        depth += 1
    return bool(level)


def as_file_name(name: str) -> str:
    """The name of a file as Python opens it where the locale's encoding lacks its characters."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        with suppress(UnicodeEncodeError):  # half an emoji: no file has such a name
            return os.fsdecode(name.encode(errors="surrogateescape"))
    return name


def find_beside(name: str, prompts_file: str) -> str:
    """The path beside the JSON file if it exists, else from the current directory."""
    if prompts_file == "-":
        return name
    beside = str(Path(prompts_file).parent / name)
    return beside if os.path.exists(beside) else name  # Path.exists fails if the name is too long


def check_jobs(jobs: list[Job], choose: bool, timestamps: bool) -> None:
    """Refuses jobs that cannot be answered by choice, or with timestamps, if that is requested."""
    if timestamps:
        check_timestamps(jobs, choose)
    if choose:
        check_choices(jobs)


def check_choices(jobs: list[Job]) -> None:
    for job in jobs:
        if not job.choices:
            raise ValueError(f'{job.place}: it has no "choices", which --choose needs.')


def check_timestamps(jobs: list[Job], choose: bool) -> None:
    """Refuses jobs whose words cannot have times, or that already have the field for them."""
    if choose:
        raise ValueError("--timestamps is for answers in the model's own words, not for --choose.")
    for job in jobs:
        if len(job.recordings) != 1:
            raise ValueError(f"{job.place}: it has several recordings; --timestamps takes one.")
        if TIMESTAMPS in job:
            raise ValueError(f'{job.place}: it has "{TIMESTAMPS}", which --timestamps writes.')


def files_in(name: str) -> list[str]:
    """The recordings in a folder and its subfolders, sorted; for a file, the file itself."""
    if not os.path.isdir(name):
        return [name]
    files = []
    for folder, subfolders, names in os.walk(name, onerror=refuse_folder):
        subfolders[:] = [subfolder for subfolder in subfolders if not subfolder.startswith(".")]
        for path in [Path(folder, of_file) for of_file in names if not of_file.startswith(".")]:
            is_broken_link = path.is_symlink() and not path.exists()  # becomes a job with an error
            is_file = path.is_file() or is_broken_link
            if path.suffix.lower() in AUDIO_SUFFIXES and is_file:
                files.append(str(path))
    if not files:
        raise ValueError(f"{name}: no sound files inside.")
    return sorted(files)


def refuse_folder(error: OSError) -> None:
    """Raises the error: an unreadable folder is not skipped silently."""
    raise error


# ---- Answering ----


def answer_jobs(
    jobs: list[Job],
    processor: AudioFlamingo3Processor,
    model: AudioFlamingo3ForConditionalGeneration,
    batch_size: int = 8,
    progress: Progress | None = None,
    choose: bool = False,
    timestamps: bool = False,
    **options,
) -> Iterator[Job]:
    """Yields the jobs with "response" or "error", in the order given. Options are `generate`'s.

    The recordings of a few batches are loaded at a time, and those of similar length are batched
    together to reduce padding. A job is yielded as soon as it and all jobs before it are done. A
    job that fails does not stop the others.
    choose: the response is the likeliest of the job's choices; see `likeliest_choice`.
    timestamps: jobs also get "words", with the time of each word; see `extras/alignment.py`.
    """
    check_jobs(jobs, choose, timestamps)
    if choose:
        batch_size = 1
    group_size = 4 * batch_size
    done = 0
    for start in range(0, len(jobs), group_size):
        group = jobs[start : start + group_size]
        loaded = load_recordings(group, processor)
        for batch in divide(loaded, batch_size):
            answer_batch(batch, processor, model, options, choose, timestamps)
            if progress:
                progress.show(start + sum(job.is_done() for job in group))
            while done < len(jobs) and jobs[done].is_done():
                if progress:
                    progress.clear()
                yield jobs[done]
                done += 1
        yield from jobs[done : start + len(group)]
        done = start + len(group)


Loaded = tuple[list[Tensor], Job]  # the waveforms of a job


def divide(loaded: list[Loaded], batch_size: int) -> Iterator[list[Loaded]]:
    """Batches of jobs of similar length; a job with several recordings is its own batch."""
    single = [pair for pair in loaded if len(pair[0]) == 1]
    single.sort(key=lambda pair: len(pair[0][0]))
    for first in range(0, len(single), batch_size):
        yield single[first : first + batch_size]
    for pair in loaded:
        if len(pair[0]) > 1:
            yield [pair]


def load_recordings(jobs: list[Job], processor: AudioFlamingo3Processor) -> list[Loaded]:
    """Each job with its waveforms; a job whose file cannot be read gets an "error" instead."""
    loaded = []
    for job in jobs:
        if job.is_done():  # its entry cannot be copied
            continue
        try:
            loaded.append(([load_one(file, processor) for file in job.recordings], job))
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            job["error"] = describe_error(error)
    return loaded


def load_one(file: str, processor: AudioFlamingo3Processor) -> Tensor:
    return processor.to_waveform(file, warn=partial(warn_about, file))


def count_audio_frames(waveform: Tensor) -> int:
    """The number of <sound> ids of a recording (n,)."""
    return sum(audio_frame_count(window) for window in waveform.split(N_SAMPLES))


def warn_about(file: str, message: str) -> None:
    """Warns with the file's name, because there are many files."""
    if str(Path(file)) not in message:
        message = f"{file}: {message}"
    warnings.warn(message)


def answer_batch(
    batch: list[Loaded],
    processor: AudioFlamingo3Processor,
    model: AudioFlamingo3ForConditionalGeneration,
    options: dict,
    choose: bool,
    timestamps: bool,
) -> None:
    """Gives each job its outcome. If a batch fails, each of its jobs is tried alone."""
    try:
        if choose:
            responses = [likeliest_choice(batch[0], processor, model)]
        else:
            inputs = make_inputs(batch, processor).to(model.device)
            ids = model.generate(**inputs, **options)
            new_ids = ids[:, inputs["input_ids"].shape[1] :]
            responses = processor.batch_decode(new_ids, skip_special_tokens=True)
            mark_cut([job for _, job in batch], new_ids, model.generation_config.eos_token_id)
        words = []
        if timestamps:
            words = [words_of(pair, ids, processor, model) for pair, ids in zip(batch, new_ids)]
        for (_, job), response in zip(batch, responses):
            job["response"] = response
        for (_, job), of_response in zip(batch, words):
            job[TIMESTAMPS] = of_response
        return
    except (ValueError, MemoryError, RuntimeError) as error:
        reason = describe_error(error)
    # Not inside `except`, where the error would keep the failed batch's tensors in memory.
    if len(batch) == 1:
        batch[0][1]["error"] = reason
        return
    for pair in batch:
        answer_batch([pair], processor, model, options, choose, timestamps)


def mark_cut(jobs: list[Job], new_ids: Tensor, eos_token_id: int | list[int]) -> None:
    """Marks the jobs whose answer, a row of new_ids (B, T), has no end token."""
    if eos_token_id != []:  # with an empty list no answer ever ends
        end_ids = torch.tensor(eos_token_id, device=new_ids.device)
        for job, ids in zip(jobs, new_ids):
            job.is_cut = not bool(torch.isin(ids, end_ids).any())


def words_of(
    loaded: Loaded,
    new_ids: Tensor,
    processor: AudioFlamingo3Processor,
    model: AudioFlamingo3ForConditionalGeneration,
) -> list[dict]:
    """The words, with their times, of an answer (new tokens,) that may be padded."""
    is_real = new_ids != model.generation_config.pad_token_id
    num_real = int(is_real.nonzero().max()) + 1 if bool(is_real.any()) else 1
    (waveform,), job = loaded
    (file,) = job.recordings
    inputs = make_inputs([loaded], processor)
    gaps = find_gaps(file, len(waveform) / SAMPLE_RATE)
    alignment = align(processor, model, inputs, new_ids[:num_real], gaps)
    if alignment.words and not alignment.follows_sound:
        warn_about(file, UNCLEAR)
    return as_fields(alignment.words)


@torch.inference_mode()
def likeliest_choice(
    loaded: Loaded,
    processor: AudioFlamingo3Processor,
    model: AudioFlamingo3ForConditionalGeneration,
) -> str:
    """The choice with the highest likelihood as the whole answer to the prompt.

    The prompt does not list the choices. It is processed only once: for each choice, the cache is
    reset to the end of the prompt.
    """
    _, job = loaded
    inputs = make_inputs([loaded], processor, list_choices=False).to(model.device)
    inputs["attention_mask"] = inputs["attention_mask"].bool()
    tokenizer = processor.tokenizer
    answers = [[*tokenizer.encode(choice), processor.end_id] for choice in job.choices]
    prompt_length = inputs["input_ids"].shape[1]
    longest = max(len(answer) for answer in answers)
    check_length(prompt_length, longest, model.config.text_config.max_position_embeddings)
    cache = model.new_cache(rows=1, capacity=prompt_length + longest)
    prompt_states = model.prefill(**inputs, cache=cache)
    log_likelihoods = []
    for answer in answers:
        cache.length = prompt_length
        ids = torch.tensor([answer], device=model.device)  # (1, T)
        read = ids[:, :-1]  # the last one, the end of the turn, is only predicted
        states = model.prefill(read, torch.ones_like(read, dtype=torch.bool), cache=cache)
        states = torch.cat([prompt_states[:, -1:], states], dim=1)
        log_probabilities = model.language_model.lm_head(states).float().log_softmax(-1)
        of_answer = log_probabilities.gather(2, ids[..., None])
        log_likelihoods.append(float(of_answer.sum()))
    return job.choices[log_likelihoods.index(max(log_likelihoods))]


def make_inputs(
    batch: list[Loaded], processor: AudioFlamingo3Processor, list_choices: bool = True
) -> Batch:
    prompts = []
    for _, job in batch:
        check_plain_prompt(job.prompt)
        prompts.append(with_choices(job.prompt, job.choices) if list_choices else job.prompt)
    waveforms, job = batch[0]
    if len(waveforms) == 1:
        return processor(prompts, [waveforms[0] for waveforms, _ in batch])
    content = [{"type": "audio", "audio": waveform} for waveform in waveforms]
    content.append({"type": "text", "text": prompts[0]})
    messages = [{"role": "user", "content": content}]
    return processor.apply_chat_template([messages], add_generation_prompt=True)


def with_choices(prompt: str, choices: list[str]) -> str:
    """The prompt and a line "(A) ..." for each choice."""
    lines = [prompt]
    for number, choice in enumerate(choices):
        lines.append(f"({choice_letter(number)}) {choice}")
    return "\n".join(lines)


def choice_letter(number: int) -> str:
    """A to Z for 0 to 25, then AA, AB and so on, as a spreadsheet labels its columns."""
    letters = ""
    while number >= 0:
        letters = chr(ord("A") + number % 26) + letters
        number = number // 26 - 1
    return letters
