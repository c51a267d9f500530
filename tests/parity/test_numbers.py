"""The numbers of transformers, for all three families of models.

They were recorded by make_goldens.py and make_music_goldens.py, from the same small checkpoints and
the same sounds; of long tensors, only every so many rows were recorded.
"""

import threading
from functools import cache

import numpy as np
import pytest
import torch

from af3 import AudioFlamingo3ForConditionalGeneration
from places import DATA
from processor import AudioFlamingo3Processor
from signals import CASES, MUSIC_CASES, conversation, sound

from_pretrained = AudioFlamingo3ForConditionalGeneration.from_pretrained

FAMILIES = {"af3": CASES, "music": MUSIC_CASES, "next": MUSIC_CASES}
FRAME_STEPS = {"af3": 13, "music": 59, "next": 59}
LOGIT_STEPS = {"af3": 29, "music": 211, "next": 211}

# Each case with padding on the left; those with several rows on the right, too.
RUNS = []
for family, cases in FAMILIES.items():
    for case, lengths in cases.items():
        RUNS.append((family, case, "left"))
        if len(lengths) > 1:
            RUNS.append((family, case, "right"))
LEFT_RUNS = [run for run in RUNS if run[2] == "left"]

on_all_runs = pytest.mark.parametrize("run", RUNS, ids="-".join)
on_left_runs = pytest.mark.parametrize("run", LEFT_RUNS, ids="-".join)


@pytest.fixture(scope="module")
def loaded(families):
    """{family: (model, processor)}"""
    pairs = {}
    for family, folder in families.items():
        processor = AudioFlamingo3Processor.from_pretrained(folder)
        pairs[family] = from_pretrained(folder, "cpu"), processor
    return pairs


@pytest.fixture(scope="module")
def recorded():
    """What transformers computed: {"family.case.side.name": tensor}"""
    arrays = {}
    for name, array in np.load(DATA / "goldens.npz").items():
        arrays[f"af3.{name}"] = torch.from_numpy(array)
    for name, array in np.load(DATA / "music_goldens.npz").items():
        if array.dtype.kind != "U":
            arrays[name] = torch.from_numpy(array)
    return arrays


@pytest.fixture(scope="module")
def theirs(recorded):
    """theirs(run, name): one tensor of a run. A run of one row is the same on either side."""

    def call(run, name):
        family, case, side = run
        sides = ["left", "right"] if len(FAMILIES[family][case]) == 1 else [side]
        names = [f"{family}.{case}.{side}.{name}" for side in sides]
        return next(recorded[name] for name in names if name in recorded)

    return call


@pytest.fixture(scope="module")
def batch_of(loaded):
    """batch_of(run): its tensors, with labels."""

    @cache
    def call(run):
        family, case, side = run
        chats = [conversation(sound(length)) for length in FAMILIES[family][case]]
        options = {"padding_side": side, "output_labels": True}
        processor = loaded[family][1]
        return processor.apply_chat_template(chats, add_generation_prompt=True, **options)

    return call


@pytest.fixture(scope="module")
def output_of(loaded, batch_of):
    """output_of(run): logits and loss."""

    @cache
    @torch.no_grad()
    def call(run):
        return loaded[run[0]][0](**batch_of(run))

    return call


def new_ids(model, batch, **options):
    """What `generate` adds to the prompt."""
    return model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]


# ---- The processor ----


@pytest.mark.parametrize("case", CASES)
def test_log_mel_and_its_mask_are_those_of_transformers(batch_of, theirs, case):
    run = ("af3", case, "left")
    batch = batch_of(run)
    features = batch["input_features"][:, ::8, ::37]
    assert (features - theirs(run, "mel")).abs().max() < 1e-4
    assert torch.equal(batch["feature_attention_mask"].sum(-1), theirs(run, "mel_frames"))


@on_all_runs
def test_ids_are_those_of_transformers(loaded, batch_of, theirs, run):
    batch = batch_of(run)
    assert torch.equal(batch["input_ids"], theirs(run, "input_ids"))
    is_real = batch["input_ids"] != loaded[run[0]][1].tokenizer.pad_token_id
    assert torch.equal(batch["attention_mask"], is_real.long())


@pytest.mark.parametrize("run", [run for run in RUNS if run[0] != "af3"], ids="-".join)
def test_labels_are_those_of_transformers(batch_of, theirs, run):
    assert torch.equal(batch_of(run)["labels"], theirs(run, "labels"))


# ---- The model ----


@on_all_runs
def test_audio_frames_are_those_of_transformers(loaded, batch_of, theirs, run):
    batch = batch_of(run)
    names = ("input_features", "feature_attention_mask", "window_index")
    frames = loaded[run[0]][0].get_audio_features(*[batch[n] for n in names if n in batch])
    expected = theirs(run, "frames")
    limit = 1e-4 * max(1, expected.abs().max())
    assert (frames[:: FRAME_STEPS[run[0]]] - expected).abs().max() <= limit


@on_all_runs
def test_logits_are_those_of_transformers(batch_of, output_of, theirs, run):
    logits = output_of(run).logits[batch_of(run)["attention_mask"].bool()]
    expected = theirs(run, "logits")
    limit = 1e-3 * max(1, expected.abs().max() / 10)
    assert (logits[:: LOGIT_STEPS[run[0]]] - expected).abs().max() <= limit


# With padding on the left, transformers' loss includes first tokens predicted from padding.
LOSS_RUNS = [run for run in RUNS if run[1:] != ("batch", "left")]


@pytest.mark.parametrize("run", LOSS_RUNS, ids="-".join)
def test_the_loss_is_that_of_transformers(output_of, theirs, run):
    assert abs(output_of(run).loss - theirs(run, "loss")) <= 1e-4


@on_left_runs
def test_64_greedy_tokens_are_those_of_transformers(loaded, batch_of, theirs, run):
    ids = new_ids(loaded[run[0]][0], batch_of(run), max_new_tokens=64)
    assert torch.equal(ids, theirs(run, "greedy"))


@on_left_runs
def test_24_tokens_with_a_repetition_penalty_are_those_of_transformers(
    loaded, batch_of, theirs, run
):
    options = {"max_new_tokens": 24, "repetition_penalty": 1.3}
    ids = new_ids(loaded[run[0]][0], batch_of(run), **options)
    assert torch.equal(ids, theirs(run, "penalised"))


@pytest.mark.parametrize(
    "family, case, name",
    [
        ("af3", "five_seconds", "af3.five_seconds.bfloat16_distance"),
        ("music", "two_windows", "music.bfloat16_distance"),
        ("next", "two_windows", "next.bfloat16_distance"),
    ],
)
def test_bfloat16_is_about_as_close_to_float32_as_in_transformers(
    families, batch_of, output_of, recorded, family, case, name
):
    run = (family, case, "left")
    exact = output_of(run).logits
    rounded_model = from_pretrained(families[family], "cpu", torch.bfloat16)
    rounded = rounded_model(**batch_of(run)).logits.float()
    assert (rounded - exact).norm() / exact.norm() <= 1.2 * recorded[name]


def test_threads_that_share_a_model_get_these_tokens_too(loaded, batch_of, theirs):
    run = ("af3", "batch", "left")
    answers = []

    def answer():
        answers.append(new_ids(loaded["af3"][0], batch_of(run), max_new_tokens=8))

    threads = [threading.Thread(target=answer) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 4
    assert all(torch.equal(ids, theirs(run, "greedy")[:, :8]) for ids in answers)
