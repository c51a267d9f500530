"""--explain: the stages of a recording's way through the model, as a table and a picture."""

import time

import pytest
import torch

from extras.explain import picture
from signals import sound, write_wav


@pytest.fixture
def explain(run, tmp_path):
    """Explains a sound of so many samples; what is printed."""

    def call(samples):
        path = write_wav(tmp_path / "a.wav", sound(samples))
        status, out, _ = run(path, "Hi", "--explain", "--max-new-tokens", 3)
        assert status == 0
        return out

    return call


def read_table(out):
    """{stage: (shape, milliseconds)}"""
    header, *lines = out.splitlines()
    stages = {}
    for line in lines[: lines.index("")]:
        name, shape, milliseconds = line[:18], line[19:39], line[40:49]
        stages[name.strip()] = (shape.strip(), float(milliseconds))
    return stages


def test_the_table_has_the_stages_and_shapes_of_the_design(explain):
    shapes = {name: shape for name, (shape, _) in read_table(explain(80000)).items()}
    prompt_shape = shapes.pop("prompt")
    assert shapes == {
        "waveform": "(80000,)",
        "log-mel": "(1, 128, 3000)",
        "conv1": "(1, 32, 501)",
        "conv2": "(1, 32, 251)",
        "2 encoder layers": "(1, 250, 32)",
        "pool, LayerNorm": "(1, 125, 32)",
        "projector": "(125, 48)",
        "embedding": prompt_shape[:-1] + ", 48)",
        "splice": prompt_shape[:-1] + ", 48)",
        "2 decoder layers": prompt_shape[:-1] + ", 48)",
        "lm_head": "(1, 647)",
        "next token": "(1,)",
    }


def test_the_times_are_positive_and_add_up_to_less_than_the_run(explain):
    start = time.perf_counter()
    stages = read_table(explain(480000))
    elapsed = 1000 * (time.perf_counter() - start)
    times = [milliseconds for _, milliseconds in stages.values()]
    assert len(times) == 13
    assert min(times) > 0
    assert sum(times) < elapsed


def test_the_answer_is_that_of_a_run_without_explain(run, clip):
    options = [clip, "Hi", "--max-new-tokens", 6]
    _, answer, _ = run(*options, "--quiet")
    _, out, _ = run(*options, "--explain")
    assert out.endswith("\n\n" + answer)


def test_the_picture_has_a_border_between_windows_and_their_audio_frames_below(explain):
    lines = [line for line in explain(720000).splitlines() if line.startswith("|")]
    assert len(lines) == 17
    assert {line.count("|") for line in lines} == {3}
    assert len({len(line) for line in lines}) == 1
    assert len(lines[0]) <= 80
    assert "750 audio frames" in lines[-1]
    assert "375 audio frames" in lines[-1]


def test_low_tones_are_drawn_below_and_later_ones_on_the_right():
    features = torch.zeros(1, 128, 3000)
    features[0, :8, 100:200] = 1  # low and late
    lines = picture(features, [200], 42, coloured=False).splitlines()
    assert lines[15][-2] == "#"
    assert lines[15][1] == " "
    assert lines[0].strip("| ") == ""


def test_a_terminal_of_256_colours_gets_colours():
    text = picture(torch.rand(1, 128, 3000), [3000], 40, coloured=True)
    assert "\x1b[38;5;" in text
    assert text.count("\n") == 16
    assert text.splitlines()[0].endswith("\x1b[0m|")


@pytest.mark.parametrize("flag, status", [("--quiet", 0), ("--explain", 2)])
def test_hooks_are_set_with_explain_only(run, clip, monkeypatch, flag, status):
    def refuse_hooks(*_, **__):
        raise RuntimeError("a hook was set")

    monkeypatch.setattr(torch.nn.Module, "register_forward_hook", refuse_hooks)
    assert run(clip, "Hi", "--max-new-tokens", 1, flag)[0] == status


def test_a_folder_and_no_recording_are_refused(run, tmp_path):
    status, out, err = run("--explain", tmp_path)
    assert (status, out) == (2, "")
    assert err.startswith("error: --explain takes one sound file")
    status, out, err = run("--explain")
    assert (status, out) == (2, "")
    assert "required: audio" in err
