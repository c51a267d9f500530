"""tiny/speakers.py holds out later takes, also in strings, and labels all recordings correctly."""

import json
import runpy
import sys

import numpy as np
import pytest

from places import ROOT
from plumbing.audio_file import load_audio
from signals import write_wav

SECONDS = {"theo": 0.2, "lucas": 0.3}  # a distinct length for each speaker, to identify them


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The lines of train.jsonl and held_out.jsonl, for two digits by two speakers.

    The recordings of held-out takes are louder.
    """
    folder = tmp_path_factory.mktemp("recordings")
    for take, loudness in ((5, 0.25), (44, 0.25), (45, 0.75), (49, 0.75)):
        for speaker, seconds in SECONDS.items():
            for digit in (0, 7):
                waveform = np.full(int(seconds * 16000), loudness)
                write_wav(folder / f"{digit}_{speaker}_{take}.wav", waveform)
    main = runpy.run_path(str(ROOT / "tiny" / "speakers.py"))["main"]
    lines_of_strings = main.__globals__["lines_of_strings"]

    def fewer_lines(recordings, count, *others):
        return lines_of_strings(recordings, min(count, 200), *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(main.__globals__, "lines_of_strings", fewer_lines)
        patch.setattr(sys, "argv", ["speakers.py", str(folder), str(folder / "out")])
        main()
    files = []
    for name in ("train.jsonl", "held_out.jsonl"):
        text = (folder / "out" / name).read_text()
        files.append([json.loads(line) for line in text.splitlines()])
    return files


@pytest.mark.parametrize("file, quiet", [(0, True), (1, False)])
def test_later_takes_are_only_in_the_held_out_data(written, file, quiet):
    assert {entry["task"] for entry in written[file]} == {"speaker", "digit", "string"}
    for entry in written[file][:40]:
        assert (load_audio(entry["audio"]).max() < 0.5) == quiet


def test_every_recording_is_labeled_with_its_speaker_and_digit(written):
    for entry in written[0][:16]:
        digit, speaker, _ = entry["audio"].rsplit("/", 1)[1].split("_")
        right = {"speaker": speaker, "digit": {"0": "zero", "7": "seven"}[digit]}
        assert entry["answer"] == right[entry["task"]]


def test_a_string_has_as_many_digits_as_its_answer_has_words(written):
    strings = [entry for entry in written[1] if entry["task"] == "string"]
    assert len(strings) == 200
    for entry in strings[:20]:
        is_loud = np.abs(load_audio(entry["audio"])) > 0.3
        starts = np.count_nonzero(is_loud[1:] & ~is_loud[:-1])
        assert starts == len(entry["answer"].split())
