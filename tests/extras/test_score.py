"""Scores: the rules and intervals that extras/score.py describes."""

import json
import sys

import pytest

from extras import score
from extras.many_recordings import with_choices
from extras.score import (
    chosen_letter,
    find_choices,
    normalize,
    score_file,
    share,
    word_error_rate,
    word_errors,
)


@pytest.fixture
def write(tmp_path):
    """Writes entries as JSON lines; returns the path."""

    def call(*entries):
        path = tmp_path / "answers.jsonl"
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        return str(path)

    return call


def line(answer, response, **fields):
    return {"audio": "a.wav", "prompt": "Hi", "answer": answer, "response": response, **fields}


# ---- Words ----


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Seven, three — ONE!", "seven three one"),
        ("  two\n\tlines ", "two lines"),
        ("don't Don’t", "dont dont"),
        ("twenty-one", "twenty one"),
        ("ﬁve ½", "five 1 2"),  # a ligature and a fraction: NFKC spells them out
        ("हिन्दी", "हिन्दी"),  # its marks stay
        ("...", ""),
    ],
)
def test_texts_are_compared_after_normalization(text, expected):
    assert normalize(text) == expected


@pytest.mark.parametrize(
    "response, answer, errors",
    [
        ("a b c", "a b c", 0),
        ("a x c", "a b c", 1),
        ("a c", "a b c", 1),
        ("a b b c", "a b c", 1),
        ("", "a b c", 3),
        ("a b c", "", 3),
        ("b c a", "a b c", 2),
    ],
)
def test_word_errors_are_the_fewest_changes(response, answer, errors):
    assert word_errors(response, answer) == errors


def test_exact_matches_are_counted_after_normalization(write):
    figures = score_file(write(line("Rain.", "rain"), line("rain", "heavy rain")))
    assert figures["all"]["exact"][0] == 0.5


def test_the_word_error_rate_is_that_of_all_words_together(write):
    figures = score_file(write(line("one two three", "one two"), line("four", "four")))
    assert figures["all"]["wer"][0] == 1 / 4


def test_the_introduction_to_a_transcription_is_removed(write):
    response = "The content of the input audio is 'you can ask why'."
    figures = score_file(write(line("You can ask why.", response)))
    assert figures["all"]["exact"][0] == 1
    assert figures["all"]["wer"][0] == 0


def test_an_error_counts_as_an_empty_response(write):
    failed = {"audio": "a.wav", "prompt": "Hi", "answer": "one two", "error": "no such file"}
    figures = score_file(write(failed, line("one", "one")))
    assert figures["all"]["lines"] == 2
    assert figures["all"]["exact"][0] == 0.5
    assert figures["all"]["wer"][0] == 2 / 3


# ---- Multiple choice ----

CHOICES = ["rain", "sea waves", "dog bark"]


@pytest.mark.parametrize(
    "text, letter",
    [
        ("(B)", "B"),
        ("(B) sea waves", "B"),
        ("(B) rain", "B"),  # the letter counts before the text
        ("(A) or (B)", None),
        ("Sea waves.", "B"),
        ("B", "B"),
        (" B\n", "B"),
        ("B.", "B"),
        ("B) sea waves", "B"),
        ("B: sea waves", "B"),
        ("The answer is B", "B"),
        ("The correct answer is (C).", "C"),
        ("Answer: B", "B"),
        ("I choose option C because A dog barks", "C"),
        ("The answer is A. No, the answer is C", "C"),
        ("It sounds like sea waves to me", "B"),
        ("either rain or sea waves", None),
        ("training", None),  # it contains "rain", but not as a word
        ("A dog is barking", None),  # an article
        ("(D)", None),
        ("wind", None),
        ("", None),
    ],
)
def test_the_letter_of_a_choice_is_found_in_a_response(text, letter):
    assert chosen_letter(text, CHOICES) == letter


MANY_CHOICES = [f"sound {number}" for number in range(730)]


@pytest.mark.parametrize(
    "text, letter",
    [
        ("(Z)", "Z"),
        ("(AA)", "AA"),
        ("(ZZ) sound 701", "ZZ"),
        ("(AAA)", "AAA"),
        ("sound 27", "AB"),
        ("AA.", "AA"),
        ("The answer is (AA).", "AA"),
        ("The answer is A", "A"),
        ("It is sound 26, surely", "AA"),
        ("(A) or (AA)", None),
        ("(ZZZ)", None),
    ],
)
def test_after_26_choices_letters_are_doubled(text, letter):
    assert chosen_letter(text, MANY_CHOICES) == letter


@pytest.mark.parametrize("count", [2, 26, 27, 53, 703])
def test_the_choices_that_a_prompt_lists_are_found_again(count):
    prompt = with_choices("Which?", MANY_CHOICES[:count])
    assert find_choices({"prompt": prompt}) == MANY_CHOICES[:count]


def test_capitals_in_the_text_of_a_choice_are_not_a_letter():
    assert find_choices({"prompt": "(A) Rome (NY) (B) Rome (IT)"}) == ["Rome (NY)", "Rome (IT)"]
    assert find_choices({"prompt": "The (USA): (A) rain (B) wind"}) == ["rain", "wind"]


def test_a_choice_whose_text_is_a_letter_counts_by_its_text():
    assert chosen_letter("A", ["B", "A", "G"]) == "B"


def test_choices_are_those_of_the_field_or_of_the_prompt():
    assert find_choices({"choices": CHOICES, "prompt": "(A) x (B) y"}) == CHOICES
    assert find_choices({"prompt": "Which? (A) rain (B) sea waves"}) == ["rain", "sea waves"]
    assert find_choices({"prompt": "Which?\n(A) rain\n(B) dog bark"}) == ["rain", "dog bark"]
    assert find_choices({"prompt": "What is vitamin (C)?"}) == []
    assert find_choices({"prompt": "Is it (B) or (A)?"}) == []


@pytest.mark.parametrize("answer", ["B", "(B)", "(B) sea waves", "Sea waves"])
def test_the_right_letter_is_found_in_the_answer_by_the_same_rules(write, answer):
    entries = [
        line(answer, "The answer is B", choices=CHOICES),
        line(answer, "(A) rain", choices=CHOICES),
        line(answer, "I cannot say", choices=CHOICES),
        line("open", "open"),
    ]
    figures = score_file(write(*entries))
    assert figures["all"]["choice"][0] == pytest.approx(1 / 3)
    assert figures["all"]["wer"][0] == 0  # of the last line alone


# ---- Intervals ----


@pytest.mark.parametrize(
    "right, n, low, high",
    [
        (8, 10, 0.4902, 0.9433),  # Brown, Cai and DasGupta's form of Wilson's interval
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (285, 300, 0.9191, 0.9694),
    ],
)
def test_the_interval_of_a_share_is_wilsons(right, n, low, high):
    p, found_low, found_high = share([True] * right + [False] * (n - right))
    assert p == right / n
    assert (found_low, found_high) == pytest.approx((low, high), abs=1e-4)


def test_the_interval_of_a_word_error_rate_is_a_bootstrap():
    outcomes = [score.Outcome(False, errors, 10, None) for errors in [0, 1, 2, 3] * 100]
    rate, low, high = word_error_rate(outcomes)
    standard_error = (1.25 / 400) ** 0.5 / 10  # 1.25 is the variance of 0, 1, 2, 3
    assert rate == 0.15
    assert (low, high) == pytest.approx(
        (0.15 - 1.96 * standard_error, 0.15 + 1.96 * standard_error), abs=1e-3
    )
    assert word_error_rate(outcomes) == [rate, low, high]


def test_there_is_no_figure_without_lines_or_words(write):
    assert score_file(write(line("B", "B", choices=CHOICES)))["all"]["wer"] is None
    assert score_file(write(line("...", "x")))["all"]["wer"] is None
    assert score_file(write(line("rain", "rain")))["all"]["choice"] is None


# ---- The command line ----


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["score", *words])
        status = score.main()
        return status, *capsys.readouterr()

    return call


def test_lines_can_be_grouped_by_any_field(write, run):
    entries = [line("a", "a", task="x"), line("b", "b", task="y"), line("c", "d", task="y")]
    status, out, _ = run(write(*entries), "--by", "task")
    assert status == 0
    assert [row.split()[:3] for row in out.splitlines()] == [
        ["lines", "exact", "wer"],
        ["all", "3", "66.7%"],
        ["task=x", "1", "100.0%"],
        ["task=y", "2", "50.0%"],
    ]


def test_any_text_is_scored_and_a_row_of_the_table_is_one_line(write, run):
    entry = line("h\ud83d!", "H\udce9", task="x\n\u2028y")
    status, out, _ = run(write(entry), "--by", "task")
    assert status == 0
    assert [row.split()[:3] for row in out.splitlines()[1:]] == [
        ["all", "1", "100.0%"],
        ["task=x", "y", "1"],
    ]


def test_json_has_the_same_figures(write, run):
    path = write(line("a", "a"), line("b", "c"))
    _, out, _ = run(path, "--json")
    assert json.loads(out) == score_file(path)


@pytest.mark.parametrize(
    "entry, reason",
    [
        (7, "line 2: a JSON object is expected"),
        ({"response": "x"}, 'line 2: "answer" is null'),
        ({"answer": 7, "response": "x"}, 'line 2: "answer" is 7'),
        ({"answer": "x"}, 'line 2: it has no "response"'),
        ({"answer": "x", "response": 7}, 'line 2: "response" is 7'),
        (line("x", "x", choices="x"), 'line 2: "choices" is "x"'),
        (line("(D)", "(A)", choices=CHOICES), 'line 2: its "answer" is not one of its choices'),
        (line("x", "x"), 'line 2: it has no "task"'),
    ],
)
def test_a_line_that_cannot_be_scored_is_reported(write, run, entry, reason):
    path = write(line("x", "x", task="x"), entry)
    status, out, err = run(path, "--by", "task")
    assert (status, out) == (2, "")
    assert reason in err
    assert err.count("\n") == 1
