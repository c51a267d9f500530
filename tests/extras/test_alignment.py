"""Word timestamps: the layers' attention weights, heads ranked without labels, word times."""

import io
import json
import re
import sys
from itertools import combinations

import numpy as np
import pytest
import torch

from af3 import AudioFlamingo3ForConditionalGeneration, rotary_tables, split_heads
from extras.alignment import (
    KEPT_HEADS,
    align,
    as_fields,
    attention_weights,
    head_score,
    loudness,
    monotonic_path,
    split_into_words,
    word_spans,
)
from extras.many_recordings import count_audio_frames
from films import write_film
from places import TINY
from plumbing.audio_file import load_audio
from processor import AudioFlamingo3Processor, feature_batch
from signals import sound

DIGITS = TINY / "samples" / "digits.wav"
SECONDS_OF_FRAME = 0.04


@pytest.fixture(scope="module")
def tiny():
    processor = AudioFlamingo3Processor.from_pretrained(TINY)
    return processor, AudioFlamingo3ForConditionalGeneration.from_pretrained(TINY, "cpu")


def answer_and_align(processor, model, waveform, prompt="Transcribe the input speech.", **options):
    inputs = processor(prompt, waveform)
    ids = model.generate(**inputs, **options)
    new_ids = ids[0, inputs["input_ids"].shape[1] :]
    return align(processor, model, inputs, new_ids), inputs, ids


@pytest.fixture(scope="module")
def spoken_words():
    """The words "seven", "three" and "one", cut out of tiny/samples/digits.wav at its pauses."""
    waveform = load_audio(TINY / "samples" / "digits.wav")
    loud = np.flatnonzero(np.abs(waveform) > 0.02 * np.abs(waveform).max())
    pauses = np.flatnonzero(np.diff(loud) > 1600)  # 0.1 s
    begins = [loud[0], *loud[pauses + 1]]
    ends = [*loud[pauses], loud[-1]]
    clips = [waveform[begin:end] for begin, end in zip(begins, ends)]
    return dict(zip(["seven", "three", "one"], clips, strict=True))


def string_of(spoken_words, text):
    """A waveform of these words with pauses of 0.15 s, and begin and end of each in seconds."""
    pause = np.zeros(2400, dtype=np.float32)
    parts = []
    spans = []
    length = 0
    for word in text.split():
        clip = spoken_words[word]
        begin = length + len(pause)
        length = begin + len(clip)
        parts += [pause, clip]
        spans.append((begin / 16000, length / 16000))
    return np.concatenate([*parts, pause]), spans


STRINGS = ["seven three one", "seven one three seven", "one three seven one seven", "one one three"]

# ---- Attention ----


@pytest.mark.parametrize("rows", [1, 3, 12])
def test_the_layer_averages_its_values_by_these_weights(model, rows):
    attention = model.language_model.model.layers[1].self_attn
    config = model.config.text_config
    x = torch.randn(1, 12, config.hidden_size, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(12)[None]
    cos, sin = rotary_tables(positions, config.head_dim, config.rope_theta, torch.float32)
    weights = attention_weights(attention, x, cos, sin, rows)
    values = split_heads(attention.v_proj(x), config.head_dim)[0]
    values = values.repeat_interleave(len(weights) // len(values), dim=0)
    averages = (weights @ values).transpose(0, 1).flatten(1)
    output = attention(x, cos, sin, mask=None, cache=None)[0, -rows:]
    torch.testing.assert_close(attention.o_proj(averages), output)


def test_probabilities_are_those_of_the_model(processor, model):
    alignment, inputs, ids = answer_and_align(processor, model, sound(24000), max_new_tokens=5)
    whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = model(**whole).logits[0, -6:-1].softmax(-1).max(-1).values
    probabilities = torch.tensor([token.probability for token in alignment.tokens])
    torch.testing.assert_close(probabilities, expected)


def test_candidates_are_sorted_and_a_greedy_answer_takes_the_first(tiny):
    alignment, _, _ = answer_and_align(*tiny, sound(24000))
    for token in alignment.tokens:
        probabilities = [probability for _, probability in token.candidates]
        assert probabilities == sorted(probabilities, reverse=True)
        assert token.candidates[0] == (token.text, token.probability)


def test_each_new_token_has_attention_to_each_audio_frame_of_all_windows(processor, model):
    waveform = sound(560123)
    alignment, _, _ = answer_and_align(processor, model, waveform, "Hi", max_new_tokens=3)
    shape = (3, count_audio_frames(torch.from_numpy(waveform)))
    assert len(alignment.heads) <= KEPT_HEADS
    for head in alignment.heads:
        assert head.attention.shape == shape
        assert bool((head.attention.sum(1) <= 1 + 1e-5).all())


def test_a_sound_token_that_the_model_has_generated_is_embedded_like_any_other(processor, model):
    inputs = processor("Hi", sound(24000))
    new_ids = torch.tensor([processor.audio_token_id, *processor.tokenizer.encode(" rain dog")])
    alignment = align(processor, model, inputs, new_ids)
    assert [token.text for token in alignment.tokens][0] == "<sound>"


def test_hooks_are_removed_even_after_an_error(processor, model, monkeypatch):
    monkeypatch.setattr("extras.alignment.head_score", lambda attention: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        answer_and_align(processor, model, sound(24000), max_new_tokens=2)
    assert not any(module._forward_pre_hooks for module in model.modules())


# ---- Heads ----


def pointing(peaks, frames=100):
    """Attention that is 1 at one frame for each word."""
    return torch.eye(frames)[list(peaks)]


def test_a_head_that_points_at_ever_later_places_scores_1():
    assert head_score(pointing([3, 20, 50, 90])) == 1


@pytest.mark.parametrize("peaks", [[50, 50, 50], [90, 50, 20]])
def test_a_head_that_points_at_one_place_or_backward_scores_0(peaks):
    assert head_score(pointing(peaks)) == 0


def test_a_score_falls_with_each_pair_of_words_that_is_out_of_order():
    assert head_score(pointing([10, 30, 20, 40])) == pytest.approx(5 / 6)


def test_a_head_with_diffuse_attention_or_little_to_the_sound_scores_low():
    diffuse = torch.full((3, 100), 0.01)
    assert head_score(0.9 * diffuse + 0.1 * pointing([10, 30, 50])) < 0.25
    assert head_score(0.1 * pointing([10, 30, 50])) == pytest.approx(0.1)


@pytest.mark.parametrize("text", STRINGS)
def test_the_best_head_of_tiny_is_the_first_of_its_fourth_layer(tiny, spoken_words, text):
    waveform, _ = string_of(spoken_words, text)
    alignment, _, _ = answer_and_align(*tiny, waveform)
    scores = [head.score for head in alignment.heads]
    assert (alignment.heads[0].layer, alignment.heads[0].head) == (3, 0)
    assert scores == sorted(scores, reverse=True)


# ---- Times ----


@pytest.mark.parametrize("text", STRINGS)
def test_words_are_found_where_they_were_spoken(tiny, spoken_words, text):
    waveform, spans = string_of(spoken_words, text)
    alignment, _, _ = answer_and_align(*tiny, waveform)
    assert " ".join(word.text for word in alignment.words) == text
    for word, (begin, end) in zip(alignment.words, spans):
        assert begin <= (word.begin + word.end) / 2 <= end
        assert word.begin == pytest.approx(begin, abs=0.12)


@pytest.mark.parametrize(
    "name, prompt, follows",
    [
        ("digits.wav", "Transcribe the input speech.", True),
        ("rain.wav", "Transcribe the input speech.", False),
        ("rain.wav", "Describe the audio.", False),
        ("digits.wav", "Who are you?", False),
    ],
)
def test_an_answer_that_does_not_follow_the_sound_is_recognized(tiny, name, prompt, follows):
    waveform = load_audio(TINY / "samples" / name)
    alignment, _, _ = answer_and_align(*tiny, waveform, prompt)
    assert alignment.follows_sound == follows


def test_the_path_is_the_best_of_all_monotonic_paths():
    scores = np.random.default_rng(0).standard_normal((4, 9))
    sums = {}
    for cuts in combinations(range(1, 9), 3):
        path = np.searchsorted(cuts, np.arange(9), side="right")
        sums[tuple(path)] = scores[path, np.arange(9)].sum()
    assert tuple(monotonic_path(scores)) == max(sums, key=sums.get)


def test_a_pause_belongs_to_neither_word():
    attention = pointing([10, 70]).numpy()
    decibels = np.full(100, -60.0)
    decibels[5:20] = -10
    decibels[60:80] = -10
    spans = np.array(word_spans(attention, decibels)) / SECONDS_OF_FRAME
    np.testing.assert_allclose(spans, [[5, 20], [60, 80]])


def test_words_that_outnumber_the_audio_frames_share_them():
    attention = np.full((7, 3), 1 / 3, dtype=np.float32)
    spans = word_spans(attention, np.zeros(3))
    assert len(spans) == 7
    for (begin, end), (next_begin, _) in zip(spans, spans[1:]):
        assert 0 <= begin < end <= next_begin
    assert spans[-1][1] <= 3 * SECONDS_OF_FRAME + 1e-9


def test_loudness_is_in_decibels_for_each_audio_frame():
    waveform = torch.from_numpy(sound(16000))
    quieter = waveform.clone()
    quieter[8000:] /= 10
    features = feature_batch([waveform, quieter])
    first, second = loudness(*features).split(25)
    difference = first - second
    torch.testing.assert_close(difference[:12], torch.zeros(12), atol=0.01, rtol=0)
    torch.testing.assert_close(difference[14:], torch.full((11,), 20.0), atol=0.2, rtol=0)


# ---- Words ----


@pytest.mark.parametrize(
    "text, words",
    [
        ("seven three one", ["seven", "three", "one"]),
        (" A voice says: two.\nYes", ["A", "voice", "says:", "two.", "Yes"]),
        ("(A) crying  dog", ["(A)", "crying", "dog"]),
        ("naïve 漢字 🙂!", ["naïve", "漢字", "🙂!"]),
        ("", []),
    ],
)
def test_a_word_begins_with_a_space_and_takes_its_punctuation(processor, text, words):
    ids = [*processor.tokenizer.encode(text), processor.end_id]
    places = split_into_words(processor, ids)
    assert [processor.decode(np.array(ids)[word]).strip() for word in places] == words


def test_the_probability_of_a_word_is_the_product_of_its_tokens(tiny):
    processor, model = tiny
    inputs = processor("Describe the audio.", sound(24000))
    new_ids = torch.tensor(processor.tokenizer.encode("A voice says: one"))
    alignment = align(processor, model, inputs, new_ids)
    token_probabilities = [token.probability for token in alignment.tokens]
    assert [word.text for word in alignment.words] == ["A", "voice", "says:", "one"]
    assert alignment.words[2].tokens == [2, 3]
    assert alignment.words[2].probability == pytest.approx(
        token_probabilities[2] * token_probabilities[3]
    )


def test_an_empty_answer_has_no_words(processor, model):
    inputs = processor("Hi", sound(24000))
    alignment = align(processor, model, inputs, torch.tensor([processor.end_id]))
    assert (alignment.words, len(alignment.tokens)) == ([], 1)


def test_fields_are_rounded(tiny):
    alignment, _, _ = answer_and_align(*tiny, load_audio(TINY / "samples" / "digits.wav"))
    fields = as_fields(alignment.words)
    assert [list(word) for word in fields] == [["word", "begin", "end", "probability"]] * 3
    assert fields[0] == {"word": "seven", "begin": 0.16, "end": 0.72, "probability": 0.9986}


# ---- The command line ----


def test_timestamps_are_lines_after_the_answer(run):
    status, out, err = run(TINY / "samples" / "digits.wav", "--timestamps", model=TINY)
    answer, *lines = out.splitlines()
    assert (status, answer) == (0, "seven three one")
    assert [line.split() for line in lines] == [
        ["0.16", "0.72", "100%", "seven"],
        ["0.92", "1.32", "100%", "three"],
        ["1.48", "1.96", "100%", "one"],
    ]
    assert "warning" not in err


def test_times_that_mean_little_are_warned_about(run):
    _, out, err = run(TINY / "samples" / "rain.wav", "Who are you?", "--timestamps", model=TINY)
    assert [line.split()[3] for line in out.splitlines()[1:]] == ["I", "don't", "know."]
    assert "warning: no attention head points at a place for each word" in err


# ---- Films ----


@pytest.fixture
def film(tmp_path, ffmpeg):
    """A film in which the three digits begin three seconds late."""
    return write_film(tmp_path / "film.mkv", [DIGITS], late=3)


IN_FILM = [("seven", 3.16, 3.72), ("three", 3.92, 4.32), ("one", 4.48, 4.96)]


def assert_in_film(words):
    for (text, begin, end), (expected, film_begin, film_end) in zip(words, IN_FILM, strict=True):
        assert text == expected
        assert (float(begin), float(end)) == pytest.approx((film_begin, film_end), abs=0.13)


def test_times_are_those_of_the_film(run, film):
    _, out, _ = run(film, "--timestamps", model=TINY)
    answer, *lines = out.splitlines()
    assert answer == "seven three one"
    words = [line.split() for line in lines]
    assert_in_film([(text, begin, end) for begin, end, _, text in words])


def test_times_of_a_film_from_standard_input_are_those_of_the_film(run, film, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(film.read_bytes())))
    _, out, _ = run("-", "--timestamps", model=TINY)
    words = [line.split() for line in out.splitlines()[1:]]
    assert_in_film([(text, begin, end) for begin, end, _, text in words])


def test_times_in_json_lines_are_those_of_the_film(run, film):
    _, out, _ = run(film, DIGITS, "--timestamps", model=TINY)
    of_film, of_wav = [json.loads(line)["words"] for line in out.splitlines()]
    assert_in_film([(word["word"], word["begin"], word["end"]) for word in of_film])
    assert of_wav[0]["begin"] == pytest.approx(0.16)


def test_an_explanation_has_the_times_of_the_film(run, film):
    _, out, _ = run("--explain", film, model=TINY)
    (axis,) = [line for line in out.splitlines() if line.startswith("  seconds |")]
    rows = re.findall(r"^' ?(\w+)' .*%  ([\d.]+) to ([\d.]+)", out, re.MULTILINE)
    assert float(axis.split("|")[1].split()[0]) == pytest.approx(3, abs=0.07)
    assert_in_film(rows)


def test_a_page_has_the_times_of_the_film(run, film, tmp_path):
    run("--explain", tmp_path / "page.html", film, model=TINY)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    assert_in_film([(word["text"], *word["film"]) for word in data["words"]])
    assert data["words"][0]["begin"] < 1  # in the sound, which the page plays
    assert data["gaps"] == [[0, pytest.approx(3, abs=0.07)]]
