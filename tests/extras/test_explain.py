"""--explain: the stages from a recording to the first new token, and each word's attention."""

from itertools import count
from types import SimpleNamespace

import pytest
import torch

from extras.explain import picture, window_widths
from extras.stage_trace import describe_frames, fold_prompt, follow
from places import TINY
from processor import feature_batch
from signals import sound, write_wav


@pytest.fixture
def explain(run, tmp_path):
    """Explains a sound of `samples` samples; returns what is printed."""

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


def test_the_time_of_a_stage_is_that_since_the_stage_before(explain, monkeypatch):
    clock = SimpleNamespace(perf_counter=count().__next__)  # a second later at each call
    monkeypatch.setattr("extras.stage_trace.time", clock)
    times = [milliseconds for _, milliseconds in read_table(explain(80000)).values()]
    assert times == [1000] * 13


def test_the_answer_is_that_of_a_run_without_explain(run, clip):
    options = [clip, "Hi", "--max-new-tokens", 6]
    _, answer, _ = run(*options, "--quiet")
    _, out, _ = run(*options, "--explain")
    assert "\nThe answer:\n" + answer in out


def test_each_part_of_a_recording_has_its_own_stages_in_order(processor, model, monkeypatch):
    waveform = torch.from_numpy(sound(8 * 480000 + 80000))
    monkeypatch.setattr(model.config.text_config, "max_position_embeddings", 7000)
    stages = follow(processor, model, waveform, "Hi", {"max_new_tokens": 1}).stages
    shapes = [stage.shape for stage in stages if stage.name == "conv1"]
    assert shapes == [(8, 32, 3000), (1, 32, 501)]
    names = [stage.name for stage in stages]
    encoder = ["conv1", "conv2", "2 encoder layers", "pool, LayerNorm", "projector"]
    assert names[3:13] == encoder * 2
    assert max(len(str(stage.shape)) for stage in stages) <= 20  # the width of the column


# ---- Frames and prompt in words ----


def test_frames_are_explained_with_their_numbers():
    text = describe_frames(199)
    assert text.startswith("199 mel frames become 100 conv frames, because")
    assert "up to 198, with its neighbors. The last sees mel frames up to 200, " in text
    assert "so conv1 is computed for 201. 100 become 50 audio frames" in text
    assert "conv1" not in describe_frames(3000)
    assert "drops" not in text
    assert describe_frames(201).endswith(" and drops an odd last one.")


def test_a_prompt_is_its_tokens_with_the_run_of_sound_folded(processor):
    inputs = processor("One <sound>", sound(24000))
    folded = fold_prompt(processor, inputs["input_ids"][0])
    counts = [count for text, count in folded if text == "<sound>"]
    assert counts == [37]
    assert [count for text, count in folded if text != "<sound>"] == [1] * (len(folded) - 1)
    spelled_out = "".join(text * count for text, count in folded)
    assert spelled_out == processor.decode(inputs["input_ids"][0])


# ---- The picture ----


def picture_lines(out):
    return [line for line in out.splitlines() if line[10:11] == "|"]


def test_the_picture_has_a_border_between_windows_and_their_audio_frames_below(explain):
    lines = picture_lines(explain(720000))[:18]
    assert {line.count("|") for line in lines} == {3}
    assert len({len(line) for line in lines}) == 1
    assert len(lines[0]) <= 80
    assert "750 audio frames" in lines[16]
    assert "375 audio frames" in lines[16]


def test_low_tones_are_drawn_at_the_bottom_and_late_ones_on_the_right():
    features = torch.zeros(1, 128, 3000)
    features[0, :8, 100:200] = 1  # low and late
    lines = picture(features, [200], 52, colored=False).splitlines()
    assert lines[15][-2] == "#"
    assert lines[15][11] == " "
    assert lines[0][10:].strip("| ") == ""


def test_axis_labels_match_the_picture():
    """A tone of 1000 Hz from 1 to 2 s is drawn in the line and columns that the axes show."""
    seconds = torch.arange(48000) / 16000
    tone = torch.sin(2 * torch.pi * 1000 * seconds) * ((seconds >= 1) & (seconds < 2))
    features, mask = feature_batch([tone])
    lines = picture(features, mask.sum(1).tolist(), 111, colored=False).splitlines()
    brightest = max(lines[:16], key=lambda line: line.count("#"))
    assert brightest.startswith("  1000 Hz ")
    axis = lines[17]
    assert axis.startswith("  seconds |0")
    assert abs(brightest.index("#") - axis.index(" 1 ") - 1) <= 1


def test_a_terminal_with_256_colors_gets_colors():
    text = picture(torch.rand(1, 128, 3000), [3000], 50, colored=True)
    assert "\x1b[38;5;" in text
    assert text.count("\n") == 17
    assert text.splitlines()[0].endswith("\x1b[0m|")


def test_each_word_has_a_line_that_is_darkest_where_it_was_spoken(run):
    _, out, _ = run("--explain", TINY / "samples" / "digits.wav", model=TINY)
    lines = picture_lines(out)[18:]
    assert [line[:9].strip() for line in lines] == ["seven", "three", "one"]
    (width,) = window_widths([199], 79)
    for line, (begin, end) in zip(lines, [(0.16, 0.71), (0.92, 1.3), (1.5, 1.94)]):
        second = (line[11:].index("@" if "@" in line else "#") + 0.5) / width * 1.99
        assert begin < second < end


def test_every_token_has_its_probability_and_candidates(run):
    _, out, _ = run("--explain", TINY / "samples" / "digits.wav", model=TINY)
    lines = out.splitlines()
    table = lines[lines.index(next(line for line in lines if line.startswith("token "))) + 1 :]
    assert len(table) == 4
    assert table[1].startswith("' three'              99.84%  0.92 to 1.32")
    assert "' two' 0.05%" in table[1]
    assert table[3].startswith("'<|im_end|>'")


def test_an_answer_that_does_not_follow_the_sound_is_marked(run):
    _, out, _ = run("--explain", TINY / "samples" / "rain.wav", "Who are you?", model=TINY)
    assert "(no attention head points at a place for each word" in out


# ---- Hooks, and bad input ----


@pytest.mark.parametrize("flag, status", [("--quiet", 0), ("--explain", 2)])
def test_hooks_are_set_with_explain_only(run, clip, monkeypatch, flag, status):
    def refuse_hooks(*_, **__):
        raise RuntimeError("a hook was set")

    monkeypatch.setattr(torch.nn.Module, "register_forward_hook", refuse_hooks)
    assert run(clip, "Hi", "--max-new-tokens", 1, flag)[0] == status


def test_a_folder_or_a_missing_recording_is_refused(run, tmp_path):
    status, out, err = run("--explain", tmp_path)
    assert (status, out) == (2, "")
    assert err.startswith("error: --explain takes one sound file")
    status, out, err = run("--explain")
    assert (status, out) == (2, "")
    assert "required: audio" in err
