"""official.py: its texts match the published ids, and it reports where an answer differs."""

import sys

import pytest

import official
from places import TINY
from plumbing.terminal import exit_with
from signals import sound, write_wav

END_ID = 151645  # <|im_end|> in the official tokenizer

PUBLISHED_IDS = {
    official.AUDIO_FLAMINGO_3[0]: """785 2213 315 279 1946 7699 374 364 9330 646 2548 3170 916 323
        916 323 916 1549 15683 1496 421 825 1899 582 10339 1449 6961 16230 323 12344 2329 323 3900
        323 7904 323 22231 448 264 3175 25777 23606 4427""",
    official.AUDIO_FLAMINGO_3[1]: """3862 374 902 2797 5025 1948 279 293 33452 323 279 4627 11 438
        807 2803 311 387 9489 315 1817 1008 13""",
    official.LANGUAGE: """5349 8 2014 13216 429 4128 4157 3158 9355 11 7578 404 4849 279 46488 315
        3691 323 4158 304 279 1879""",
    official.AUDIO_FLAMINGO_NEXT[0]: """785 293 33452 323 4627 525 6617 3786 11 892 374 16500 438
        807 525 537 11136 5815 448 1817 1008 13""",
}


@pytest.mark.parametrize("question", PUBLISHED_IDS)
def test_the_published_texts_have_the_published_ids(official_tokenizer, question):
    ids = [int(token_id) for token_id in PUBLISHED_IDS[question].split()]
    assert official_tokenizer.encode(question.answer) == ids
    decoded = official_tokenizer.decode([*ids, END_ID], skip_special_tokens=True)
    assert decoded == question.answer


def test_every_question_has_its_published_ids():
    for question in official.AUDIO_FLAMINGO_3 + official.AUDIO_FLAMINGO_NEXT:
        assert question in PUBLISHED_IDS


@pytest.fixture
def recordings(tmp_path):
    for question in official.AUDIO_FLAMINGO_3:
        write_wav(tmp_path / question.recording, sound(16000))
    return tmp_path


@pytest.fixture
def run_official(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["official.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as leaving:
            exit_with(official.main)
        return leaving.value.code, *capsys.readouterr()

    return call


def test_answers_that_differ_are_reported_with_their_first_token(run_official, recordings):
    status, output, _ = run_official(TINY, recordings)
    assert status == 1
    assert output.count("in the published answer") == 3
    assert "token 1 is" in output
    assert output.count("(this one may differ in bfloat16)") == 1


def test_the_published_answer_is_recognized(run_official, recordings, monkeypatch):
    _, output, _ = run_official(TINY, recordings)
    answers = [line.split(":", 1)[1].strip() for line in output.split("\n") if "answer:  " in line]
    questions = []
    for question, answer in zip(official.AUDIO_FLAMINGO_3, answers):
        questions.append(official.Question(question.recording, question.prompt, answer))
    monkeypatch.setattr(official, "AUDIO_FLAMINGO_3", questions)
    status, output, _ = run_official(TINY, recordings)
    assert status == 0
    assert output.count("the published answer, all") == 3


def test_without_arguments_it_explains_what_to_download(run_official):
    status, output, _ = run_official()
    assert status == 2
    assert "hf download nvidia/audio-flamingo-3-hf" in output


def test_a_missing_recording_is_reported(run_official, recordings):
    (recordings / official.LANGUAGE.recording).unlink()
    status, _, errors = run_official(TINY, recordings)
    assert status == 2
    assert errors.startswith(f"error: {recordings / official.LANGUAGE.recording}: no such file")


def test_a_model_without_published_answers_is_refused(run_official, music_flamingo, recordings):
    status, _, errors = run_official(music_flamingo, recordings)
    expected = {
        "music": (2, "error: No answers are published for Music Flamingo.\n"),
        "next": (1, ""),
    }
    assert (status, errors) == expected[music_flamingo.name]
