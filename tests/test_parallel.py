"""Several processes: the lines of one, in its order; or the tokens of one, with half of the weights
in each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import generate
from af3 import AudioFlamingo3ForConditionalGeneration
from conftest import ROOT, TINY
from extras.parallel import check_options, split_model
from signals import sound, write_wav

from_pretrained = AudioFlamingo3ForConditionalGeneration.from_pretrained


@pytest.fixture
def together(micro):
    """Runs the command line in several processes, as torchrun starts them."""

    def call(processes, *arguments, **options):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", processes, ROOT / "generate.py"]
        command += ["--model", micro, "--device", "cpu", *arguments]
        words = [str(word) for word in command]
        return subprocess.run(words, capture_output=True, text=True, **options)

    return call


@pytest.fixture
def folder(tmp_path) -> Path:
    """Six recordings, of which the second cannot be read."""
    recordings = tmp_path / "recordings"
    recordings.mkdir()
    for number, seconds in enumerate((3, 1, 0.5, 2, 1.5, 0.75)):
        write_wav(recordings / f"{number}.wav", sound(int(seconds * 16000), seed=number))
    (recordings / "1.wav").write_text("no sound")
    return recordings


def lines_that_begin(word: str, text: str) -> list[str]:
    return sorted(line for line in text.splitlines() if line.startswith(word))


# ---- Sharing the recordings ----


def test_lines_and_warnings_are_those_of_one_process(run, together, folder):
    options = [folder, "Hi", "--max-new-tokens", 8, "--batch-size", 2, "--timestamps"]
    status, out, err = run(*options)
    assert (status, out.count('"error"'), out.count('"words"')) == (1, 1, 5)
    result = together(2, *options)
    assert result.stdout == out  # in the same order
    warnings = lines_that_begin("warning: ", result.stderr)
    assert warnings == lines_that_begin("warning: ", err)
    assert any("3.wav" in warning for warning in warnings)  # which the second process has answered
    assert result.stderr.splitlines()[-1].startswith("answered 5 of 6 in ")
    assert result.returncode == 0  # torchrun would take another status for a crash


def test_an_output_file_is_gone_on_with_by_more_processes_than_recordings(
    run, together, clip, tmp_path
):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"audio": clip, "id": i}) + "\n" for i in range(3)))
    output = tmp_path / "out.jsonl"
    options = ["--prompts", prompts, "Hi", "--max-new-tokens", 2, "--output", output]
    run(*options)
    lines = output.read_text().splitlines(keepends=True)
    output.write_text(lines[0])
    result = together(3, *options)
    assert output.read_text() == "".join(lines)
    assert result.stdout == ""
    assert "answered 2 of 2 (and 1 before)" in result.stderr


# A program that takes the place of ffmpeg and kills the process that calls it.
KILLER = """#!/bin/sh
[ "$RANK" = 1 ] && kill -9 $PPID
"""


@pytest.mark.parametrize("option", ["--batch-size=1", "--tensor-parallel"])
def test_the_death_of_a_process_is_named_in_one_line(together, folder, tmp_path, option):
    (folder / "1.wav").rename(folder / "1.mp3")  # which ffmpeg has to read
    killer = tmp_path / "bin" / "ffmpeg"
    killer.parent.mkdir()
    killer.write_text(KILLER)
    killer.chmod(0o755)
    environment = os.environ | {"PATH": f"{killer.parent}:{os.environ['PATH']}"}
    result = together(2, folder, "Hi", option, env=environment)
    assert result.returncode == 1
    (line,) = lines_that_begin("error: ", result.stderr)
    name = "another process" if option == "--tensor-parallel" else "process 1"
    assert line.startswith(f"error: {name} has died")
    assert "give the same command again" in line


def test_a_single_recording_is_refused_in_one_line(together, clip):
    result = together(2, clip, "Hi")
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = lines_that_begin("error: ", result.stderr)
    assert "one recording is for one process; --tensor-parallel splits the model" in line


# ---- Splitting the model ----


def test_a_split_model_draws_the_tokens_of_a_whole_one(run, together, folder):
    options = [folder, "Hi", "--max-new-tokens", 24, "--sample", "--seed", 1, "--quiet"]
    _, out, _ = run(*options)
    assert out.count('"response"') == 5
    result = together(2, *options, "--tensor-parallel")
    assert result.stdout == out
    assert (result.returncode, result.stderr) == (0, "")


@pytest.fixture
def part_of(monkeypatch, micro):
    """The model of one of two processes, the other of which there is not."""

    def load(rank):
        monkeypatch.setattr(dist, "get_world_size", lambda: 2)
        monkeypatch.setattr(dist, "get_rank", lambda: rank)
        return split_model(from_pretrained(micro, "cpu"))

    return load


def linear_layers(model) -> list[nn.Linear]:
    return [layer for layer in model.language_model.modules() if isinstance(layer, nn.Linear)]


def test_two_processes_have_the_halves_of_each_linear_layer(model, part_of):
    layers = zip(linear_layers(model), linear_layers(part_of(0)), linear_layers(part_of(1)))
    for whole, first, second in layers:
        dim = int(first.weight.shape[0] == whole.weight.shape[0])
        assert torch.equal(torch.cat([first.weight, second.weight], dim), whole.weight)
        assert abs(first.weight.numel() - second.weight.numel()) <= whole.in_features
    assert len(linear_layers(part_of(0))) == 7 * 2 + 1


def test_the_cache_of_a_process_has_its_heads_only(part_of):
    cache = part_of(0).new_cache(rows=1, capacity=3)
    assert cache.keys[0].shape == (1, 1, 3, 12)  # one key-value head of two


def test_heads_that_cannot_be_divided_are_refused_with_both_numbers(monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    reason = "num_key_value_heads, which is 1 in this model, .* processes, which is 2"
    with pytest.raises(ValueError, match=reason):
        split_model(from_pretrained(TINY, "cpu"))


def test_one_process_is_not_enough_to_split_a_model(run, clip):
    status, out, err = run(clip, "--tensor-parallel")
    assert (status, out) == (2, "")
    assert "--tensor-parallel needs several processes" in err


@pytest.mark.parametrize(
    "options, reason",
    [
        (["--chat"], "--chat is for one process"),
        (["--explain="], "--explain is for one process"),
        (["--tensor-parallel", "--timestamps"], "--timestamps needs all heads"),
        (["--tensor-parallel", "--think"], "takes no adapter"),
        (["--tensor-parallel", "--adapter", "x"], "takes no adapter"),
    ],
)
def test_what_processes_cannot_do_together_is_refused(monkeypatch, options, reason):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    args = generate.make_parser().parse_args([*options, "a.wav"])
    with pytest.raises(ValueError, match=reason):
        check_options(args, is_for_many=False)
