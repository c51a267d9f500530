"""Several processes: the same lines as one process, in the same order; or the same tokens, with
half of the weights in each."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import generate
from af3 import AudioFlamingo3EncoderConfig, AudioFlamingo3ForConditionalGeneration
from extras import command_line
from extras.parallel import check_options, keep_part, split_model
from places import ROOT, TINY
from signals import sound, write_wav

from_pretrained = AudioFlamingo3ForConditionalGeneration.from_pretrained


@pytest.fixture
def together(micro):
    """Runs the command line in several processes, as torchrun starts them."""

    def call(processes, *arguments, program=ROOT / "generate.py", **options):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", processes, program]
        command += ["--model", micro, "--device", "cpu", *arguments]
        words = [str(word) for word in command]
        return subprocess.run(words, capture_output=True, text=True, **options)

    return call


@pytest.fixture
def folder(tmp_path) -> Path:
    """Six recordings, the second of which cannot be read."""
    recordings = tmp_path / "recordings"
    recordings.mkdir()
    for number, seconds in enumerate((3, 1, 0.5, 2, 1.5, 0.75)):
        write_wav(recordings / f"{number}.wav", sound(int(seconds * 16000), seed=number))
    (recordings / "1.wav").write_text("no sound")
    return recordings


def lines_that_begin(word: str, text: str) -> list[str]:
    return sorted(line for line in text.splitlines() if line.startswith(word))


# ---- Sharing the recordings ----


def test_lines_and_warnings_equal_those_of_one_process(run, together, folder, odd_clip):
    os.truncate(odd_clip, 30000)  # so that there is a warning
    options = [folder, odd_clip, "H\udce9?", "--max-new-tokens", 4, "--batch-size", 2]
    options.append("--timestamps")
    status, out, err = run(*options)
    assert (status, out.count('"error"'), out.count('"words"')) == (1, 1, 6)
    result = together(2, *options)
    assert result.stdout == out  # in the same order
    warnings = lines_that_begin("warning: ", result.stderr)
    assert warnings == lines_that_begin("warning: ", err)
    assert any("3.wav" in warning for warning in warnings)  # answered by the second process
    assert result.stderr.splitlines()[-1].startswith("answered 6 of 7 in ")
    assert result.returncode == 0  # torchrun would take another status for a crash


def test_processes_finish_an_output_file_that_lacks_answers(run, together, clip, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"audio": clip, "id": i}) for i in range(3)]
    lines.append(f'{{"audio": "{clip}", "of": {"[" * 900 + "]" * 900}}}')  # cannot be exchanged
    prompts.write_text("\n".join(lines))
    output = tmp_path / "out.jsonl"
    options = ["--prompts", prompts, "Hi", "--max-new-tokens", 2, "--output", output]
    run(*options)
    whole = output.read_text()
    assert (whole.count('"response"'), whole.count('"error"')) == (3, 1)
    output.write_text(whole.splitlines(keepends=True)[0])
    result = together(2, *options)
    assert output.read_text() == whole
    assert result.stdout == ""
    assert "answered 2 of 3 (and 1 before)" in result.stderr


# A program that replaces ffmpeg and kills the process that calls it.
KILLER = """#!/bin/sh
[ "$RANK" = 1 ] && kill -9 $PPID
"""


def test_the_death_of_a_process_is_reported_in_one_line(together, folder, tmp_path):
    (folder / "1.wav").rename(folder / "1.mp3")  # which ffmpeg has to read
    killer = tmp_path / "bin" / "ffmpeg"
    killer.parent.mkdir()
    killer.write_text(KILLER)
    killer.chmod(0o755)
    environment = os.environ | {"PATH": f"{killer.parent}:{os.environ['PATH']}"}

    def run_with(option):
        return together(2, folder, "Hi", option, env=environment)

    names = {"--batch-size=1": "process 1", "--tensor-parallel": "another process"}
    with ThreadPoolExecutor(2) as pool:  # both at once: they mostly wait
        results = list(pool.map(run_with, names))
    for result, name in zip(results, names.values()):
        assert result.returncode == 1
        (line,) = lines_that_begin("error: ", result.stderr)
        assert line.startswith(f"error: {name} has died")
        assert "run the same command again" in line


# ---- Splitting the model ----


# generate.py, where each process notes how much of the decoder it has.
NOTING_SIZES = """
import os, sys
from pathlib import Path

sys.path.insert(0, os.getcwd())
import generate
from extras import parallel

def size(model):
    weights = model.language_model.model.layers.parameters()
    return sum((w.to_local() if hasattr(w, "to_local") else w).numel() for w in weights)

def noting_split(model, device, split=parallel.split_model):
    whole = size(model)
    model = split(model, device)
    heads = model.new_cache(1, 3).keys[0].shape[1]
    sizes = Path(__file__).with_suffix("." + os.environ["RANK"])
    sizes.write_text(f"{heads} {size(model) / whole}")
    return model

parallel.split_model = noting_split
sys.exit(generate.main())
"""


def test_a_split_model_samples_the_tokens_of_a_whole_one_with_half_of_its_weights(
    run, together, clip, odd_clip, tmp_path
):
    options = [clip, odd_clip, "H\udce9?", "--max-new-tokens", 12, "--sample", "--seed", 1]
    _, out, _ = run(*options, "--quiet")
    assert out.count('"response"') == 2
    program = tmp_path / "generate.py"
    program.write_text(NOTING_SIZES)
    options += ["--quiet", "--tensor-parallel"]
    result = together(2, *options, program=program, cwd=ROOT)
    assert result.stdout == out
    assert (result.returncode, result.stderr) == (0, "")
    for rank in range(2):
        heads, share = program.with_suffix(f".{rank}").read_text().split()
        assert heads == "1"  # of two
        assert 0.5 <= float(share) < 0.52  # the norms are whole


@pytest.fixture
def alone():
    """A process group of this process only."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("dim", [0, 1])
def test_each_process_keeps_its_part_of_a_weight(alone, monkeypatch, rank, dim):
    mesh = init_device_mesh("cpu", (1,))
    monkeypatch.setattr(type(mesh), "size", lambda self: 2)
    monkeypatch.setattr(type(mesh), "get_rank", lambda self: rank)
    linear = nn.Linear(6, 4, bias=dim == 0)
    whole = linear.weight.detach().clone()
    keep_part(linear, mesh, dim)
    assert torch.equal(linear.weight.to_local(), whole.chunk(2, dim)[rank])
    assert linear.weight.shape == whole.shape


def test_the_plan_covers_every_linear_layer_of_the_decoder(alone, micro):
    split = split_model(from_pretrained(micro, "cpu"))
    weights = [m.weight for m in split.language_model.modules() if isinstance(m, nn.Linear)]
    assert len(weights) == 7 * 2 + 1
    assert all(isinstance(weight, DTensor) for weight in weights)


def test_heads_that_cannot_be_divided_are_reported_with_both_numbers(monkeypatch):
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
        ([], "one recording is for one process; --tensor-parallel splits the model instead"),
        (["--chat"], "--chat is for one process"),
        (["--explain="], "--explain is for one process"),
        (["--tensor-parallel", "--timestamps"], "--timestamps needs all heads"),
        (["--tensor-parallel", "--choose"], "without --tensor-parallel"),
        (["--tensor-parallel", "--int4"], "does not support --int8 and --int4"),
        (["--tensor-parallel", "--think"], "does not support adapters"),
        (["--tensor-parallel", "--adapter", "x"], "does not support adapters"),
    ],
)
def test_options_that_several_processes_do_not_support_are_refused(monkeypatch, options, reason):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    parser = generate.make_parser()
    command_line.add_options(parser)
    args = parser.parse_args([*options, "a.wav"])
    with pytest.raises(ValueError, match=reason):
        check_options(args, is_for_many=False)


def test_heads_are_counted_from_the_width_of_the_projections(model):
    attention = model.audio_tower.layers[0].self_attn
    half = AudioFlamingo3EncoderConfig(hidden_size=32, num_attention_heads=2)
    shard = type(attention)(half)
    for name in ("q_proj", "k_proj", "v_proj"):  # one of two heads
        setattr(shard, name, torch.nn.Linear(32, 16))
    shard.out_proj = torch.nn.Linear(16, 32)
    assert shard(torch.zeros(1, 5, 32), None).shape == (1, 5, 32)
