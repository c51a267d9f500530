"""Positional arguments: ambiguous ones are refused, with a suggestion."""

import pytest

from plumbing.positional_arguments import split_words

SUFFIXES = {".wav", ".mp3"}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A directory with a.wav, b.mp3 and a folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.wav").touch()
    (tmp_path / "b.mp3").touch()
    (tmp_path / "folder").mkdir()


def split(*words, may_be_prompt=False):
    return split_words(list(words), SUFFIXES, may_be_prompt)


@pytest.mark.parametrize(
    "words, recordings, prompt",
    [
        (["a.wav"], ["a.wav"], None),
        (["a.wav", "What?"], ["a.wav"], "What?"),
        (["a.wav", ""], ["a.wav"], ""),
        (["a.wav", "Transcribe."], ["a.wav"], "Transcribe."),
        (["a.wav", "Is it e.g. rain.txt?"], ["a.wav"], "Is it e.g. rain.txt?"),
        (["a.wav", "b.mp3"], ["a.wav", "b.mp3"], None),
        (["a.wav", "folder", "What is this?"], ["a.wav", "folder"], "What is this?"),
        (["-", "What?"], ["-"], "What?"),
        (["a.wav", "Is http://a.b/c.wav a link?"], ["a.wav"], "Is http://a.b/c.wav a link?"),
    ],
)
def test_files_come_first_then_the_prompt(files, words, recordings, prompt):
    assert split(*words) == (recordings, prompt)


@pytest.mark.parametrize(
    "words, message",
    [
        (["gone.wav"], "gone.wav: no such file; a sound file is expected."),
        (["gone"], "gone: no such file; a sound file is expected."),
        (["a.wav", "gone.wav"], "gone.wav: no such file; a sound file is expected."),
        (["gone.wav", "What?"], "gone.wav: no such file; a sound file is expected."),
        (["a.wav", "b b.mp3"], "If it is the prompt, end it with a question mark."),
        (
            ["What?", "a.wav"],
            "'What?' is not a file; the recordings come first, then the prompt",
        ),
        (["What?", "a.wav"], ': a.wav "What?".'),
        (["a.wav", "What", "is", "it?"], 'put it in quotes: "What is it?".'),
        (["a.wav", "nofolder/"], "nofolder/: no such file or folder"),
        (["a.wav", "\u2013timestamps"], "an option begins with two hyphens"),
        (["a.wav", "rain.txt"], "rain.txt: no such file or folder"),
        (["a.wav", "page.htm"], "If it is the prompt, write more than one word."),
        (["What sound is this?"], "A prompt comes after its recording."),
    ],
)
def test_other_words_are_refused_with_a_suggestion(files, words, message):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        split(*words)
    assert message in str(error.value)


def test_a_prompt_may_come_without_recordings(files):
    assert split("What?", may_be_prompt=True) == ([], "What?")
    assert split(may_be_prompt=True) == ([], None)
