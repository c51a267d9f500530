"""Asks official weights the published questions and compares the answers with the published ones.

    python tools/official.py MODEL FOLDER

MODEL   a directory or cached hub name of Audio Flamingo 3 or Audio Flamingo Next (but not its
        -think or -captioner checkpoint, nor Music Flamingo: for these no answers are published)
FOLDER  contains these recordings:
            Why_do_we_ask_questions_converted.wav
            dogs_barking_in_sync_with_the_music.wav
            Ch6Ae9DT6Ko_00-04-03_00-04-31.wav

To download both, on a machine with 17 GB of memory and 17 GB of disk space:

    pip install huggingface_hub
    hf download nvidia/audio-flamingo-3-hf "*.json" "*.jinja" "model-*-of-*.safetensors"
    hf download nvidia/AudioSkills --repo-type dataset --include "assets/*.wav" --local-dir .
    python tools/official.py nvidia/audio-flamingo-3-hf assets

Prints a line for each question, with the first token that differs. Exits with status 1 if an answer
that must agree does not. In bfloat16, two devices may choose differently between tokens that are
almost equally likely; where that is known to happen, a difference is only reported.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
from af3 import AudioFlamingo3ForConditionalGeneration
from plumbing.terminal import exit_with, printable
from processor import AudioFlamingo3Processor


@dataclass(frozen=True)
class Question:
    recording: str
    prompt: str
    answer: str  # as published in the tests of transformers
    must_agree: bool = True


SURPRISE = "What is surprising about the relationship between the barking and the music?"
PHILOSOPHER = (
    "Why is the philosopher's name mentioned in the lyrics? "
    "(A) To express a sense of nostalgia "
    "(B) To indicate that language cannot express clearly, satirizing the inversion of black and "
    "white in the world "
    "(C) To add depth and complexity to the lyrics "
    "(D) To showcase the wisdom and influence of the philosopher"
)
LANGUAGE = Question(
    "Ch6Ae9DT6Ko_00-04-03_00-04-31.wav",
    PHILOSOPHER,
    "(B) To indicate that language cannot express clearly, satirizing the inversion of black and "
    "white in the world",
)

AUDIO_FLAMINGO_3 = [
    Question(
        "Why_do_we_ask_questions_converted.wav",
        "Transcribe the input speech.",
        "The content of the input audio is 'you can ask why over and over and over again forever "
        "even if one day we explain every physical interaction and scientific law and hope and "
        "dream and regret with a single elegant equation'.",
    ),
    Question(
        "dogs_barking_in_sync_with_the_music.wav",
        SURPRISE,
        "There is no clear relationship between the barking and the music, as they seem to be "
        "independent of each other.",
        must_agree=False,
    ),
    LANGUAGE,
]

AUDIO_FLAMINGO_NEXT = [
    Question(
        "dogs_barking_in_sync_with_the_music.wav",
        SURPRISE,
        "The barking and music are heard together, which is unexpected as they are not typically "
        "associated with each other.",
        must_agree=False,
    ),
    LANGUAGE,
]


def ask(
    question: Question,
    folder: Path,
    processor: AudioFlamingo3Processor,
    model: AudioFlamingo3ForConditionalGeneration,
) -> bool:
    """Prints how the answer compares; returns False if it must agree and does not."""
    batch = processor(question.prompt, folder / question.recording).to(model.device)
    ids = model.generate(**batch, max_new_tokens=100, do_sample=False)
    new_ids = ids[0, batch["input_ids"].shape[1] :].tolist()
    expected_ids = [*processor.tokenizer.encode(question.answer), processor.end_id]
    if new_ids == expected_ids:
        print(f"{question.recording}: the published answer, all {len(new_ids)} tokens")
        return True
    print(f"{question.recording}: {first_difference(new_ids, expected_ids, processor)}")
    text = processor.decode(new_ids, skip_special_tokens=True)
    print(f"    answer:    {printable(text)}")
    print(f"    published: {question.answer}")
    if text == question.answer:
        return True
    if not question.must_agree:
        print("    (this one may differ in bfloat16)")
    return not question.must_agree


def first_difference(
    ids: list[int], expected_ids: list[int], processor: AudioFlamingo3Processor
) -> str:
    """Describes the first difference between two lists of ids, which must not be equal."""
    place = 0
    while ids[place : place + 1] == expected_ids[place : place + 1]:
        place += 1
    texts = []
    for some_ids in (ids, expected_ids):
        text = processor.decode(some_ids[place : place + 1])
        texts.append(repr(text) if text else "nothing")
    return f"token {place + 1} is {texts[0]}, and {texts[1]} in the published answer"


def published_questions(model: AudioFlamingo3ForConditionalGeneration) -> list[Question]:
    """Returns the questions for this model. Raises ValueError if no answers are published."""
    if model.rotary_time is None:
        return AUDIO_FLAMINGO_3
    if model.config.text_config.rope_theta == 15_300_000:
        return AUDIO_FLAMINGO_NEXT
    raise ValueError("No answers are published for Music Flamingo.")


def check_recordings(questions: list[Question], folder: Path) -> None:
    for question in questions:
        if not (folder / question.recording).is_file():
            raise FileNotFoundError(
                f"{folder / question.recording}: no such file; "
                "run this program without arguments to see what to download."
            )


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__)
        return 2
    name, folder = sys.argv[1:]
    check_recordings([LANGUAGE], Path(folder))  # before the long loading
    processor = AudioFlamingo3Processor.from_pretrained(name)
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(name)
    questions = published_questions(model)
    check_recordings(questions, Path(folder))
    verdicts = [ask(question, Path(folder), processor, model) for question in questions]
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    exit_with(main)
