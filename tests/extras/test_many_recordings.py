"""Many recordings: a JSON line for each, in the order given, each answered as if it were alone."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from af3 import AudioFlamingo3Encoder, AudioFlamingo3ForConditionalGeneration
from extras.alignment import UNCLEAR, Alignment
from extras.answer_lines import open_output
from extras.many_recordings import answer_jobs, choice_letter, read_jobs, with_choices
from processor import AudioFlamingo3Processor
from programs import PROGRAM, Terminal, generate, start_generate
from signals import sound, write_wav

ONE_TOKEN = ("--max-new-tokens", 1)


@pytest.fixture
def folder(tmp_path):
    """Clips of 0.5 to 3 s in two folders, a text file, and one with the suffix of a sound."""
    clips = tmp_path / "clips"
    for number, seconds in enumerate((3, 0.5, 2, 1.5, 0.75)):
        path = clips / f"part {number % 2}" / f"{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_wav(path, sound(int(seconds * 16000), seed=number))
    (clips / "notes.txt").write_text("no sound")
    (clips / "broken.WAV").write_text("no sound either")
    return clips


def parse_lines(text):
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def run_lines(run):
    """Runs the command line; returns the objects that it prints as JSON lines. Checks that the exit
    status is 1 if any of them is an error."""

    def call(*arguments):
        status, out, _ = run(*arguments)
        jobs = parse_lines(out)
        assert status == int(any("error" in job for job in jobs))
        return jobs

    return call


# ---- Answers ----


def test_a_folder_is_answered_in_order_and_each_recording_as_if_alone(run, run_lines, folder):
    jobs = run_lines(folder, "Hi", "--max-new-tokens", 4, "--batch-size", 2)
    files = [str(path) for path in folder.rglob("*") if path.suffix.lower() == ".wav"]
    assert [job["audio"] for job in jobs] == sorted(files)
    for job in jobs:
        if not job["audio"].endswith("broken.WAV"):
            _, alone, _ = run(job["audio"], "Hi", "--max-new-tokens", 4, "--quiet")
            assert job["response"] + "\n" == alone


def test_a_recording_that_cannot_be_read_gets_an_error_and_the_others_answers(run, folder):
    _, out, err = run(folder, "Hi", *ONE_TOKEN)
    broken = parse_lines(out)[0]
    assert list(broken) == ["audio", "prompt", "error"]
    assert broken["audio"].endswith("broken.WAV")
    assert err.startswith("answered 5 of 6 in ")


def test_the_last_word_is_the_prompt_if_it_is_not_a_file(run_lines, clip, folder):
    without_prompt = run_lines(clip, clip, *ONE_TOKEN)
    with_prompt = run_lines(clip, folder / "part 0", "Who?", *ONE_TOKEN)
    assert {job["prompt"] for job in without_prompt} == {"Transcribe the input speech."}
    assert {job["prompt"] for job in with_prompt} == {"Who?"}


def test_hidden_folders_are_skipped_and_a_file_is_used_once(run_lines, clip, tmp_path):
    folder = tmp_path / "folder"
    (folder / ".hidden").mkdir(parents=True)
    write_wav(folder / ".hidden" / "a.wav", sound(8000))
    write_wav(folder / "b.wav", sound(8000))
    jobs = run_lines(folder, folder / "b.wav", folder / "b.wav", folder, "Hi", *ONE_TOKEN)
    assert [Path(job["audio"]).name for job in jobs] == ["b.wav"]


def test_a_folder_that_cannot_be_read_is_reported(run, clip, tmp_path, monkeypatch):
    locked = tmp_path / "folder" / "locked"
    locked.mkdir(parents=True)
    scandir = os.scandir

    def refusing_scandir(path):
        if str(path) == str(locked):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing_scandir)
    status, _, err = run(clip, tmp_path / "folder", "Hi")
    assert (status, err) == (2, f"error: {locked}: Permission denied\n")


def test_a_job_is_yielded_as_soon_as_those_before_it_are_done(processor, model, tmp_path):
    names = []
    for number, seconds in enumerate((1, 3, 2, 4)):
        names.append(str(write_wav(tmp_path / f"{number}.wav", sound(seconds * 16000))))
    jobs = read_jobs(None, names, "Hi")
    done = []
    for _ in answer_jobs(jobs, processor, model, batch_size=1, max_new_tokens=1):
        done.append([job.is_done() for job in jobs])
    # In the order of their lengths: 0, 2, 1, 3.
    assert done[0] == [True, False, False, False]
    assert done[1] == [True, True, True, False]


def record_lengths(monkeypatch):
    """A list that collects, for each batch, the lengths of its recordings in samples."""
    lengths = []
    call = AudioFlamingo3Processor.__call__

    def recording_call(processor, texts, audios, **options):
        lengths.append([len(audio) for audio in audios])
        return call(processor, texts, audios, **options)

    monkeypatch.setattr(AudioFlamingo3Processor, "__call__", recording_call)
    return lengths


def test_recordings_of_similar_length_share_a_batch(run, folder, monkeypatch):
    lengths = record_lengths(monkeypatch)
    run(folder, "Hi", *ONE_TOKEN, "--batch-size", 2)
    assert lengths == [[8000, 12000], [24000, 32000], [48000]]


def test_a_batch_that_does_not_fit_in_memory_is_answered_one_by_one(run_lines, folder, monkeypatch):
    generate_ids = AudioFlamingo3ForConditionalGeneration.generate

    def run_out_of_memory(model, input_ids, *rest, **options):
        if len(input_ids) > 1:
            raise RuntimeError("out of memory")
        return generate_ids(model, input_ids, *rest, **options)

    monkeypatch.setattr(AudioFlamingo3ForConditionalGeneration, "generate", run_out_of_memory)
    jobs = run_lines(folder, "Hi", *ONE_TOKEN)
    assert sum("response" in job for job in jobs) == 5


def test_a_recording_too_large_for_memory_gets_its_own_error(run_lines, folder, monkeypatch):
    load = AudioFlamingo3Processor.to_waveform

    def run_out_of_memory(processor, audio, *arguments, **options):
        if str(audio).endswith("3.wav"):
            raise MemoryError("Unable to allocate 11.2 GiB")
        return load(processor, audio, *arguments, **options)

    monkeypatch.setattr(AudioFlamingo3Processor, "to_waveform", run_out_of_memory)
    jobs = run_lines(folder, "Hi", *ONE_TOKEN)
    errors = {Path(job["audio"]).name: job["error"] for job in jobs if "error" in job}
    assert errors["3.wav"] == "Unable to allocate 11.2 GiB"
    assert sum("response" in job for job in jobs) == 4


@pytest.mark.parametrize("end_ids, cut", [([0], 3), (list(range(1000)), 0)])
def test_answers_that_reach_the_limit_are_counted(run, folder, spoiled, end_ids, cut):
    path = spoiled / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": end_ids}))
    _, _, err = run(folder / "part 0", "Hi", "--max-new-tokens", 3, model=spoiled)
    assert ("ended by the limit, which --max-new-tokens sets: 3" in err) == (cut == 3)


def test_every_warning_includes_its_recording(run, spoiled, tmp_path):
    path = spoiled / "processor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_audio_len": 30}))
    long = write_wav(tmp_path / "long.wav", sound(31 * 16000))
    asked = {"audio": str(long), "prompt": "<sound><sound>"}  # refused, so nothing is computed
    prompts = write_lines(tmp_path / "in.jsonl", [asked, asked])
    _, _, err = run("--prompts", prompts, *ONE_TOKEN, "--quiet", model=spoiled)
    assert err == f"warning: {long}: 31.0 s of audio: only the first 30.0 s are heard\n" * 2


def test_a_warning_that_times_mean_little_includes_the_recording(run, clip, monkeypatch):
    monkeypatch.setattr(Alignment, "follows_sound", False)
    _, _, err = run(clip, "Hi", *ONE_TOKEN, "--timestamps", "--batch-size", 2, "--quiet")
    assert err == f"warning: {clip}: {UNCLEAR}\n"


def test_control_characters_in_an_answer_are_escaped(run, clip, monkeypatch):
    def steering_texts(processor, ids, **_):
        return ["\x1b[2J\x9b\x7fü"] * len(ids)

    monkeypatch.setattr(AudioFlamingo3Processor, "batch_decode", steering_texts)
    _, out, _ = run(clip, clip, "Hi", *ONE_TOKEN)
    assert "\\u001b[2J\\u009b\\u007fü" in out
    assert parse_lines(out)[0]["response"] == "\x1b[2J\x9b\x7fü"


# ---- JSON lines of prompts ----


def write_lines(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_fields_of_a_prompt_are_kept(run_lines, clip, tmp_path):
    entries = [
        {"audio": clip, "prompt": "Hi", "id": 7, "of": {"a": [1]}},
        {"audio": clip},
        {"id": "ü", "audio": "gone.wav"},
        {"audio": clip, "prompt": "<sound><sound>"},
    ]
    prompts = write_lines(tmp_path / "in.jsonl", entries)
    jobs = run_lines("--prompts", prompts, "Else", *ONE_TOKEN)
    assert ["response" in job for job in jobs] == [True, True, False, False]
    assert "gone.wav" in jobs[2]["error"]
    assert "2 '<sound>'" in jobs[3]["error"]
    for entry, job in zip(entries, jobs):
        entry.setdefault("prompt", "Else")
        asked = {name: job[name] for name in job if name not in ("response", "error")}
        assert asked == entry


def test_a_gold_answer_passes_through_and_fields_keep_their_order(run_lines, clip, tmp_path):
    entry = {"id": 1, "prompt": "Hi", "answer": "gold", "audio": clip, "task": "x"}
    prompts = write_lines(tmp_path / "in.jsonl", [entry])
    (job,) = run_lines("--prompts", prompts, *ONE_TOKEN)
    assert list(job) == ["id", "prompt", "answer", "audio", "task", "response"]
    assert job["answer"] == "gold"


def test_fields_may_have_other_names(run_lines, clip, tmp_path):
    entry = {"audio_id": clip, "question": "Hi"}
    prompts = write_lines(tmp_path / "in.jsonl", [entry])
    fields = "audio=audio_id,prompt=question"
    (job,) = run_lines("--prompts", prompts, "--fields", fields, *ONE_TOKEN)
    (expected,) = run_lines(clip, "Hi", *ONE_TOKEN, "--batch-size", 1)
    assert list(job) == ["audio_id", "question", "response"]
    assert job["response"] == expected["response"]


def test_an_array_is_read_like_lines(run_lines, clip, tmp_path):
    entries = [{"audio": clip, "prompt": "Hi"}, {"audio": clip, "prompt": "Who?"}]
    prompts = tmp_path / "in.json"
    prompts.write_text(json.dumps(entries, indent=1))
    jobs = run_lines("--prompts", prompts, *ONE_TOKEN)
    assert [job["prompt"] for job in jobs] == ["Hi", "Who?"]


def stdin_of(text: str) -> io.TextIOWrapper:
    """Standard input with another encoding than that of the text, which is UTF-8."""
    return io.TextIOWrapper(io.BytesIO(text.encode()), encoding="latin-1")


def test_entries_are_read_from_standard_input(run_lines, clip, monkeypatch):
    monkeypatch.setattr(sys, "stdin", stdin_of(json.dumps({"audio": clip, "prompt": "Hörst du?"})))
    (job,) = run_lines("--prompts", "-", *ONE_TOKEN)
    assert job["prompt"] == "Hörst du?"


def test_closed_standard_input_is_refused(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    status, _, err = run("--prompts", "-")
    assert status == 2
    assert "Standard input is closed" in err


def test_a_file_is_looked_up_beside_the_entries_first(run_lines, clip, tmp_path, monkeypatch):
    prompts = write_lines(tmp_path / "in.jsonl", [{"audio": Path(clip).name}])
    monkeypatch.chdir("/")
    (job,) = run_lines("--prompts", prompts, *ONE_TOKEN)
    assert job["audio"] == "clip.wav"
    assert "response" in job


def test_an_entry_may_have_several_recordings(run_lines, clip, tmp_path, model, processor):
    prompts = write_lines(tmp_path / "in.jsonl", [{"audio": [clip, clip], "prompt": "Alike?"}])
    (job,) = run_lines("--prompts", prompts, "--max-new-tokens", 5)
    content = [{"type": "audio", "path": clip}] * 2 + [{"type": "text", "text": "Alike?"}]
    chat = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(chat, add_generation_prompt=True)
    ids = model.generate(**inputs, max_new_tokens=5)[:, -5:]
    assert job["response"] == processor.batch_decode(ids, skip_special_tokens=True)[0]


def test_choices_are_lines_of_the_prompt(run_lines, clip, tmp_path):
    entry = {"audio": clip, "prompt": "Which?", "choices": ["rain", "wind"]}
    (job,) = run_lines("--prompts", write_lines(tmp_path / "in.jsonl", [entry]), *ONE_TOKEN)
    whole_prompt = "Which?\n(A) rain\n(B) wind"
    (expected,) = run_lines(clip, whole_prompt, *ONE_TOKEN, "--batch-size", 1)
    assert job["response"] == expected["response"]
    assert job["prompt"] == "Which?"


def test_choices_after_the_26th_have_letters_as_the_columns_of_a_spreadsheet():
    letters = [choice_letter(number) for number in (0, 25, 26, 27, 51, 52, 701, 702)]
    assert letters == ["A", "Z", "AA", "AB", "AZ", "BA", "ZZ", "AAA"]
    lines = with_choices("Which?", ["x"] * 28).split("\n")
    assert lines[-3:] == ["(Z) x", "(AA) x", "(AB) x"]


def test_choose_answers_with_the_likeliest_choice(run_lines, clip, tmp_path, model, processor):
    choices = ["rain", "a dog that barks", "seven"]
    entry = {"audio": clip, "prompt": "What is this?", "choices": choices}
    prompts = write_lines(tmp_path / "in.jsonl", [entry])
    (job,) = run_lines("--prompts", prompts, "--choose")

    # The same, with a separate forward pass for each choice.
    log_likelihoods = []
    for choice in choices:
        answer = [*processor.tokenizer.encode(choice), processor.end_id]
        batch = processor("What is this?", [clip])
        ids = torch.cat([batch["input_ids"], torch.tensor([answer])], dim=1)
        batch["input_ids"] = ids
        batch["attention_mask"] = torch.ones_like(ids)
        scores = model(**batch).logits[0, -len(answer) - 1 : -1].log_softmax(-1)
        log_likelihoods.append(float(scores[range(len(answer)), answer].sum()))
    best = max(range(3), key=lambda number: log_likelihoods[number])
    assert job["response"] == choices[best]
    assert job["prompt"] == "What is this?"


def test_choose_encodes_a_recording_once(run_lines, clip, tmp_path, monkeypatch):
    encoded = []
    forward = AudioFlamingo3Encoder.forward

    def counting_forward(self, *arguments):
        encoded.append(1)
        return forward(self, *arguments)

    monkeypatch.setattr(AudioFlamingo3Encoder, "forward", counting_forward)
    entry = {"audio": clip, "prompt": "Which?", "choices": ["rain", "wind", "thunder"]}
    run_lines("--prompts", write_lines(tmp_path / "in.jsonl", [entry]), "--choose")
    assert len(encoded) == 1


def test_choose_needs_choices(run, clip, tmp_path):
    prompts = write_lines(tmp_path / "in.jsonl", [{"audio": clip, "prompt": "Which?"}])
    status, _, err = run("--prompts", prompts, "--choose")
    assert status == 2
    assert 'has no "choices"' in err


def test_timestamps_are_fields_and_the_same_alone_and_in_a_batch(run, clip, tmp_path):
    long = write_wav(tmp_path / "long.wav", sound(60000))
    options = ["Hi", "--timestamps", "--max-new-tokens", 12]
    _, together, _ = run(clip, long, *options)
    _, alone, _ = run(clip, long, *options, "--batch-size", 1)
    for job, job_alone in zip(parse_lines(together), parse_lines(alone), strict=True):
        assert list(job) == ["audio", "prompt", "response", "words"]
        assert " ".join(word["word"] for word in job["words"]) == " ".join(job["response"].split())
        assert [word["begin"] for word in job["words"]] == [w["begin"] for w in job_alone["words"]]


def test_answers_with_timestamps_are_recognized_as_answered(run, clip, tmp_path):
    output = tmp_path / "out.jsonl"
    options = [clip, "Hi", "--timestamps", *ONE_TOKEN, "--output", output]
    run(*options)
    _, _, err = run(*options)
    assert "nothing left to answer" in err
    assert len(parse_lines(output.read_text())) == 1


@pytest.mark.parametrize(
    "field, value, option, reason",
    [
        (
            "audio",
            ["a.wav", "b.wav"],
            "--batch-size=1",
            "it has several recordings; --timestamps takes one",
        ),
        ("words", 7, "--batch-size=1", 'has "words"'),
        ("choices", ["rain"], "--choose", "not for --choose"),
    ],
)
def test_timestamps_are_refused_where_they_are_impossible(
    run, tmp_path, field, value, option, reason
):
    entry = {"audio": "a.wav", field: value}
    prompts = write_lines(tmp_path / "in.jsonl", [entry])
    status, out, err = run("--prompts", prompts, "--timestamps", option)
    assert (status, out) == (2, "")
    assert reason in err


@pytest.mark.parametrize(
    "content, reason",
    [
        ('{"audio": "a.wav"}\nno JSON\n', "in.jsonl: line 2: not valid JSON"),
        ('[{"audio": "a.wav"}', "in.jsonl: not valid JSON"),
        ("[]", "in.jsonl: no entries inside"),
        ("\n", "in.jsonl: no entries inside"),
    ],
)
def test_a_file_that_is_not_json_is_refused(run, tmp_path, content, reason):
    prompts = tmp_path / "in.jsonl"
    prompts.write_text(content)
    status, out, err = run("--prompts", prompts)
    assert (status, out) == (2, "")
    assert reason in err


@pytest.mark.parametrize(
    "line, reason",
    [
        ("7", "a JSON object is expected"),
        ('{"prompt": "Hi"}', 'it has no "audio"'),
        ('{"audio": 7}', '"audio" is 7'),
        ('{"audio": []}', '"audio" is []'),
        ('{"audio": "https://a.b/c.wav"}', "https://a.b/c.wav: a URL"),
        ('{"audio": "a.wav", "prompt": 7}', '"prompt" is 7'),
        ('{"audio": "a.wav", "choices": "rain"}', '"choices" is "rain"'),
        ('{"audio": "a.wav", "choices": [""]}', '"choices" is [""]'),
        ('{"audio": "a.wav", "prompt": null}', '"prompt" is null'),
        ('{"audio": "a.wav", "response": "mine"}', 'it has "response"'),
    ],
)
def test_an_invalid_entry_is_reported_before_any_work(run, tmp_path, line, reason):
    prompts = tmp_path / "in.jsonl"
    prompts.write_text('{"audio": "a.wav"}\n\n' + line)
    status, out, err = run("--prompts", prompts)
    assert (status, out) == (2, "")
    assert f"in.jsonl: line 3: {reason}" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["EMPTY"], "no sound files inside"),
        (["CLIP", "CLIP", "--batch-size", 0], "--batch-size is 0"),
        (["CLIP", "CLIP", "<|im_start|>x"], "The prompt starts with"),
        (["CLIP", "CLIP", "--chatty"], "--chatty"),
        (["CLIP", "CLIP", "--max-new-tokens", 0], "max_new_tokens is 0"),
        (["--prompts", "gone.jsonl"], "gone.jsonl"),
        (["--prompts", "/dev/null"], "null: not a file"),
        (["--prompts", "x.jsonl", "--fields", "sound=a"], "audio=NAME,prompt=NAME is expected"),
    ],
)
def test_bad_input_gets_one_line_and_exit_status_2(run, clip, tmp_path, arguments, reason):
    (tmp_path / "empty").mkdir()
    names = {"CLIP": clip, "EMPTY": tmp_path / "empty"}
    status, out, err = run(*[names.get(argument, argument) for argument in arguments])
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert reason in err
    assert err.count("\n") == 1


# ---- Resuming after an interruption ----


def test_resume_skips_answered_jobs_and_retries_errors(run_lines, folder, tmp_path):
    jobs = run_lines(folder, "Hi", *ONE_TOKEN)
    earlier = write_lines(tmp_path / "out.jsonl", [jobs[0], jobs[2], jobs[4]])
    with open(earlier, "a") as file:
        file.write(json.dumps(jobs[5])[:-9])  # cut off
    resumed = run_lines(folder, "Hi", *ONE_TOKEN, "--resume", earlier)
    assert [job["audio"] for job in resumed] == [jobs[i]["audio"] for i in (0, 1, 3, 5)]


def test_resume_answers_another_prompt_about_the_same_recordings(run_lines, folder, tmp_path):
    jobs = run_lines(folder, "Hi", *ONE_TOKEN)
    earlier = write_lines(tmp_path / "out.jsonl", jobs)
    resumed = run_lines(folder, "Other", *ONE_TOKEN, "--resume", earlier)
    assert [job["prompt"] for job in resumed] == ["Other"] * 6


def test_resume_reads_a_file_that_ends_within_a_character(run_lines, clip, tmp_path):
    earlier = tmp_path / "out.jsonl"
    earlier.write_bytes('{"audio": "x", "response": "ü'.encode()[:-1])
    assert len(run_lines(clip, "Hi", *ONE_TOKEN, "--resume", earlier)) == 1


def test_a_job_that_occurs_twice_needs_two_answers(run, run_lines, clip, tmp_path):
    asked = {"audio": clip, "prompt": "Hi"}
    prompts = write_lines(tmp_path / "in.jsonl", [asked, asked])
    jobs = run_lines("--prompts", prompts, *ONE_TOKEN)
    assert len(jobs) == 2
    earlier = write_lines(tmp_path / "out.jsonl", jobs[:1])
    assert len(run_lines("--prompts", prompts, *ONE_TOKEN, "--resume", earlier)) == 1


def test_entries_without_a_prompt_are_counted_unless_the_command_line_has_one(run, clip, tmp_path):
    prompts = write_lines(tmp_path / "in.jsonl", [{"audio": clip, "promt": "Who?"}])
    _, _, err = run("--prompts", prompts, *ONE_TOKEN, "--quiet")
    assert 'entries without "prompt": 1 of 1; they are asked "Transcribe' in err
    _, _, err = run("--prompts", prompts, "Who?", *ONE_TOKEN, "--quiet")
    assert err == ""


def test_several_bad_entries_are_reported_at_once(run, clip, tmp_path):
    entries = [{"audio": 7}, {"audio": clip}, {"prompt": "Hi"}, *[[]] * 5]
    status, _, err = run("--prompts", write_lines(tmp_path / "in.jsonl", entries))
    assert status == 2
    assert "line 1: " in err
    assert "line 2: " not in err
    assert "line 3: " in err
    assert err.endswith("And 2 more lines are wrong.\n")


@pytest.mark.parametrize("exists", [False, True])
def test_resume_may_be_given_in_the_first_run(run_lines, clip, tmp_path, exists):
    earlier = tmp_path / "out.jsonl"
    if exists:
        earlier.touch()  # as the shell does for `>> out.jsonl`
    assert len(run_lines(clip, "Hi", *ONE_TOKEN, "--resume", earlier)) == 1


def test_when_everything_is_answered_no_model_is_loaded(
    run, run_lines, clip, tmp_path, monkeypatch
):
    jobs = run_lines(clip, clip, "Hi", *ONE_TOKEN)
    for job in jobs:  # the same file by another name
        job["audio"] = job["audio"].replace("/clip.wav", "/./clip.wav")
    earlier = write_lines(tmp_path / "out.jsonl", jobs)
    monkeypatch.setattr("extras.command_line.load_model", None)
    status, out, err = run(clip, clip, "Hi", *ONE_TOKEN, "--resume", earlier)
    assert (status, out) == (0, "")
    assert err.startswith("nothing left to answer")


def test_an_output_that_was_cut_off_within_a_line_can_be_appended_to(clip, micro, tmp_path):
    earlier = tmp_path / "out.jsonl"
    earlier.write_text('{"audio": "x", "prom')
    options = [clip, "Hi", "--max-new-tokens", "1", "--model", micro, "--resume", earlier]
    with open(earlier, "a") as out:
        subprocess.run([*PROGRAM, *options], stdout=out, check=True)
    cut_line, new_line = earlier.read_text().splitlines()
    assert cut_line == '{"audio": "x", "prom'
    assert "response" in json.loads(new_line)


def test_an_interrupted_run_leaves_whole_lines_and_can_be_resumed(
    run_lines, folder, micro, tmp_path
):
    earlier = tmp_path / "out.jsonl"
    options = [folder, "Hi", "--batch-size", 1, "--quiet", "--resume", earlier]
    process = start_generate(*options, "--model", micro, "--max-new-tokens", 300)
    first_line = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate()
    assert process.returncode in (130, 0)  # 0 if it had already ended
    before = parse_lines((first_line + rest).decode())
    earlier.write_bytes(first_line + rest)
    after = before + run_lines(*options, *ONE_TOKEN)
    assert len({job["audio"] for job in after if "response" in job}) == 5


# ---- An output file ----


def test_an_output_file_given_again_is_completed_without_duplicates(run, folder, tmp_path):
    output = tmp_path / "out.jsonl"
    options = [folder, "Hi", *ONE_TOKEN, "--output", output]
    assert run(*options)[:2] == (1, "")
    first = parse_lines(output.read_text())
    assert len(first) == 6
    write_wav(folder / "broken.WAV", sound(8000))
    assert run(*options)[:2] == (0, "")
    second = parse_lines(output.read_text())
    assert sorted(job["audio"] for job in second) == sorted(job["audio"] for job in first)
    assert all("response" in job for job in second)
    assert run(*options)[0] == 0
    assert parse_lines(output.read_text()) == second


def test_an_output_file_that_was_cut_off_is_repaired(run, folder, tmp_path):
    output = tmp_path / "out.jsonl"
    options = [folder, "Hi", *ONE_TOKEN, "--output", output]
    run(*options)
    whole = output.read_text()
    output.write_text(whole[:-20])
    run(*options)
    repaired = parse_lines(output.read_text())
    assert sorted(map(str, repaired)) == sorted(map(str, parse_lines(whole)))


def test_responses_to_other_questions_stay_in_an_output_file(run, clip, tmp_path):
    output = tmp_path / "out.jsonl"
    run(clip, "Hi", *ONE_TOKEN, "--output", output)
    run(clip, "Who?", *ONE_TOKEN, "--output", output)
    assert [job["prompt"] for job in parse_lines(output.read_text())] == ["Hi", "Who?"]


def test_a_file_of_another_kind_is_not_overwritten(run, clip, tmp_path):
    output = tmp_path / "notes.txt"
    output.write_text("dear diary\nsecond line\n")
    status, _, err = run(clip, "Hi", *ONE_TOKEN, "--output", output)
    assert status == 2
    assert "notes.txt: line 1 is not an answer" in err
    assert output.read_text() == "dear diary\nsecond line\n"


@pytest.mark.parametrize(
    "content",
    ["my only notes", '[{"audio": "a.wav"}]', '{"mine": 1}', '{"audio": "a.wav", "prompt": "x"}\n'],
)
def test_a_last_line_that_is_not_an_answer_is_not_overwritten(run, clip, tmp_path, content):
    output = tmp_path / "mine.json"
    output.write_text(content)
    status, _, err = run(clip, "Hi", *ONE_TOKEN, "--output", output)
    assert (status, "mine.json: line 1 is not an answer" in err) == (2, True)
    assert output.read_text() == content


def test_the_questions_are_not_overwritten_by_their_answers(run, clip, tmp_path):
    questions = write_lines(tmp_path / "q.jsonl", [{"audio": clip}])
    before = questions.read_text()
    status, _, err = run("--prompts", questions, "--output", questions)
    assert (status, "would be lost" in err) == (2, True)
    assert questions.read_text() == before


def test_files_beside_the_output_are_left_alone_and_a_link_stays_a_link(run_lines, clip, tmp_path):
    store = tmp_path / "store.jsonl"
    store.write_text('{"audio": "x.wav", "response"')  # cut off, so the file is written anew
    link = tmp_path / "out.jsonl"
    link.symlink_to(store)
    beside = tmp_path / "store.jsonl.new"
    beside.write_text("mine")
    run_lines(clip, "Hi", *ONE_TOKEN, "--output", link)
    assert link.is_symlink()
    assert store.read_text().count("response") == 1
    assert beside.read_text() == "mine"
    assert len(list(tmp_path.glob("*store*"))) == 2


def test_two_runs_do_not_write_to_the_same_output(run, clip, tmp_path):
    output = tmp_path / "out.jsonl"
    with open_output(str(output), []):
        status, _, err = run(clip, "Hi", *ONE_TOKEN, "--output", output)
    assert (status, "another run is writing to it" in err) == (2, True)
    assert run(clip, "Hi", *ONE_TOKEN, "--output", output)[0] == 0


def test_a_field_name_that_no_entry_has_is_refused(run, clip, tmp_path):
    questions = write_lines(tmp_path / "q.jsonl", [{"file": clip, "question": "What?"}])
    status, _, err = run("--prompts", questions, "--fields", "audio=file,prompt=questoin")
    assert (status, 'no entry has the field "questoin"' in err) == (2, True)


def test_a_broken_link_in_a_folder_gets_a_line_with_an_error(run, clip, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "broken.wav").symlink_to(tmp_path / "nowhere.wav")
    status, out, _ = run(folder, "Hi", *ONE_TOKEN)
    assert status == 1
    assert "no such file" in parse_lines(out)[0]["error"]


def test_a_file_that_is_not_utf_8_is_reported_with_the_line(run, clip, tmp_path):
    questions = tmp_path / "q.jsonl"
    questions.write_bytes(b'{"audio": "a.wav"}\n{"audio": "b.wav", "prompt": "gr\xf6\xdfe"}\n')
    status, _, err = run("--prompts", questions)
    assert (status, "q.jsonl: line 2 is not UTF-8" in err) == (2, True)


# ---- Names and texts with any characters ----


def test_a_name_that_is_not_utf_8_has_the_same_line_on_stdout_and_in_a_file(
    run, odd_clip, tmp_path
):
    output = tmp_path / "out.jsonl"
    _, out, _ = run(odd_clip, "Hi", *ONE_TOKEN, "--batch-size", 1)
    status, _, _ = run(odd_clip, "Hi", *ONE_TOKEN, "--output", output)
    assert status == 0
    assert output.read_text() == out
    assert "caf\\udce9.wav" in out
    (job,) = parse_lines(out)
    assert os.fsencode(job["audio"]) == os.fsencode(odd_clip)


def test_a_line_is_readable_and_one_line_to_every_reader(run_lines, clip, tmp_path):
    prompts = write_lines(
        tmp_path / "in.jsonl", [{"audio": clip, "prompt": "ü\u2028漢\x85🙂\ud83d"}]
    )
    output = tmp_path / "out.jsonl"
    run_lines("--prompts", prompts, *ONE_TOKEN, "--output", output)
    (line,) = output.read_text(encoding="utf-8").splitlines()  # U+2028 would end a line here
    assert r"ü\u2028漢\u0085🙂\ud83d" in line
    assert json.loads(line)["prompt"] == "ü\u2028漢\x85🙂\ud83d"


@pytest.mark.parametrize(
    "fields",
    [
        r'"prompt": "half \ud83d"',
        r'"prompt": "\ude00\ud83d", "\ud83d": "\udce9"',
        '"id": NaN, "of": [-Infinity, 1e400, -0.0]',
        f'"id": 1{"0" * 4000}, "of": 0.1234567890123456789',
        '"id": 1, "id": 2, "of": {"b": [{}, [], null], "a": {"b": 1.0, "a": 1}}',
        f'"of": {"[" * 90}{"]" * 90}',
        r'"of": "\u2028\u0085\ufeff\r\n\u0000"',
    ],
)
def test_an_answered_entry_is_recognized_whatever_its_fields_are(run, clip, tmp_path, fields):
    prompts = tmp_path / "in.jsonl"
    prompts.write_text(f'{{"audio": {json.dumps(clip)}, {fields}}}')
    options = ["--prompts", prompts, "Hi", *ONE_TOKEN, "--output", tmp_path / "out.jsonl"]
    assert run(*options)[0] == 0
    before = (tmp_path / "out.jsonl").read_bytes()
    assert "nothing left to answer" in run(*options)[2]
    assert (tmp_path / "out.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ["é", "e\u0301", "a\nb", "a\u2028b", "\ufeffa", "a\\b", " a  b"])
def test_an_answered_file_is_recognized_whatever_its_name_is(run, tmp_path, name):
    folder = tmp_path / "clips"
    folder.mkdir()
    write_wav(folder / f"{name}.wav", sound(8000))
    options = [folder, "Hi", *ONE_TOKEN, "--output", tmp_path / "out.jsonl"]
    assert run(*options)[0] == 0
    assert "nothing left to answer" in run(*options)[2]
    (job,) = parse_lines((tmp_path / "out.jsonl").read_text(encoding="utf-8"))
    assert job["audio"] == str(folder / f"{name}.wav")


def test_a_run_that_is_cut_anywhere_in_an_odd_line_ends_with_the_same_bytes(
    run, clip, odd_clip, tmp_path
):
    output = tmp_path / "out.jsonl"
    options = [clip, odd_clip, "Ü?", *ONE_TOKEN, "--output", output]
    run(*options)
    whole = output.read_bytes()
    name = whole.index(b"\\udce9")
    for place in [name + 1, name + 4, whole.rindex("Ü".encode()) + 1, len(whole) - 1]:
        output.write_bytes(whole[:place])
        assert run(*options)[0] == 0
        assert output.read_bytes() == whole


def test_bytes_that_are_not_utf_8_stay_in_an_output_file(run, clip, tmp_path):
    output = tmp_path / "out.jsonl"
    line = b'{"audio": "x.wav", "prompt": "gr\xfcn", "response": "ja"}\n'
    output.write_bytes(line + b'{"audio": "cut')
    assert run(clip, "Hi", *ONE_TOKEN, "--output", output)[0] == 0
    assert output.read_bytes().startswith(line + b'{"audio": "' + os.fsencode(clip))


@pytest.mark.parametrize("depth", [101, 500, 900])
def test_an_entry_that_cannot_be_copied_gets_an_error_and_the_others_answers(
    run, clip, tmp_path, depth
):
    deep = "[" * depth + "1" + "]" * depth
    prompts = tmp_path / "in.jsonl"
    prompts.write_text(f'{{"audio": "{clip}", "id": 1, "of": {deep}}}\n{{"audio": "{clip}"}}\n')
    output = tmp_path / "out.jsonl"
    for _ in range(2):
        status, _, err = run("--prompts", prompts, "Hi", *ONE_TOKEN, "--output", output)
        lines = sorted(parse_lines(output.read_text()), key=len)
        assert [list(line)[2:] for line in lines] == [["response"], ["prompt", "error"]]
        assert 'in.jsonl: line 1: "of" has more than 100 lists' in lines[1]["error"]


def test_a_name_that_is_too_long_gets_an_error_and_the_others_answers(run_lines, clip, tmp_path):
    entries = [{"audio": 300 * "x"}, {"audio": clip}]
    jobs = run_lines("--prompts", write_lines(tmp_path / "in.jsonl", entries), "Hi", *ONE_TOKEN)
    assert ["response" in job for job in jobs] == [False, True]
    assert "File name too long" in jobs[0]["error"]


def test_entries_that_differ_only_in_a_field_called_words_are_told_apart(run, clip, tmp_path):
    entries = [{"audio": "gone.wav", "words": 1}, {"audio": clip, "words": 2}]
    entries = [{**entry, "audio": str(tmp_path / "a.wav")} for entry in entries]
    output = write_lines(tmp_path / "out.jsonl", [{**entries[1], "prompt": "Hi", "response": "x"}])
    prompts = write_lines(tmp_path / "in.jsonl", entries)
    run("--prompts", prompts, "Hi", *ONE_TOKEN, "--output", output)
    outcomes = [(job["words"], "error" in job) for job in parse_lines(output.read_text())]
    assert outcomes == [(2, False), (1, True)]


C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_names_and_prompts_mean_the_same_in_the_c_locale(run, clip, micro, tmp_path):
    folder = tmp_path / "grün"
    folder.mkdir()
    os.rename(clip, folder / "é.wav")
    prompts = write_lines(folder / "in.jsonl", [{"audio": "é.wav"}])
    options = ["--prompts", prompts, "Hörst du?", *ONE_TOKEN, "--output", tmp_path / "out.jsonl"]
    result = generate(*options, "--model", micro, env=os.environ | C_LOCALE)
    assert result.returncode == 0
    (job,) = parse_lines((tmp_path / "out.jsonl").read_text(encoding="utf-8"))
    assert list(job.items())[:2] == [("audio", "é.wav"), ("prompt", "Hörst du?")]
    assert "nothing left to answer" in run(*options)[2]


def test_stdout_is_as_readable_as_its_encoding_allows(run, clip, micro):
    options = [clip, "ü?", *ONE_TOKEN, "--batch-size", 1]
    assert '"prompt": "ü?"' in run(*options)[1]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    result = generate(*options, "--model", micro, env=environment, encoding="ascii")
    assert r'"prompt": "\u00fc?"' in result.stdout


# ---- Progress ----


def test_progress_is_shown_in_a_terminal(folder, micro):
    terminal = Terminal(folder, "Hi", *ONE_TOKEN, "--batch-size", 2, "--model", micro)
    shown = terminal.read_until(rb"answered 5 of 6 in [\d.]+ s")
    assert terminal.process.wait() == 1  # one file is broken
    assert b"3 of 6, " in shown
    assert b"a second, " in shown
    assert b"s left" in shown


def test_progress_is_not_shown_in_a_pipe(run, folder):
    _, _, err = run(folder, "Hi", *ONE_TOKEN)
    assert " of 6, " not in err
