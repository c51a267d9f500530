"""Everything runs on a second device without mixing it with the CPU, and gives the CPU's results.

There is no such device: tests/support/pretended_device.py stands in for a GPU.
"""

import json

import pytest
import torch

from af3 import AudioFlamingo3ForConditionalGeneration
from extras.alignment import align
from extras.chat import Conversation
from extras.long_prompts import use_unmasked_attention
from extras.many_recordings import answer_jobs, read_jobs
from extras.quantize import quantize
from extras.short_windows import encode_short_windows_apart
from places import TINY
from pretended_device import DEVICE, PretendedDevice, pretend
from processor import AudioFlamingo3Processor
from signals import sound


@pytest.fixture
def device():
    with PretendedDevice():
        yield DEVICE


@pytest.fixture
def batch(processor):
    """Rows of two windows and of one."""
    return processor(["What?", "Is it loud?"], [sound(500000), sound(16000)], output_labels=True)


def load(folder):
    return AudioFlamingo3ForConditionalGeneration.from_pretrained(folder, "cpu")


def test_logits_and_loss_are_computed_there(device, micro, model, batch):
    expected = model(**batch)
    output = pretend(load(micro))(**batch.to(device))
    assert output.logits.device == output.loss.device == device
    assert torch.equal(output.logits.cpu(), expected.logits)
    assert torch.equal(output.loss.cpu(), expected.loss)


@pytest.mark.parametrize("family", ["af3", "music"])
def test_tokens_are_generated_there(device, families, family):
    processor = AudioFlamingo3Processor.from_pretrained(families[family])
    batch = processor(["What?", "Is it loud?"], [sound(500000), sound(16000)])
    options = {"max_new_tokens": 6, "repetition_penalty": 1.3}
    sampling = {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 2.0, **options}
    ids = []
    for model, place in (
        (load(families[family]), "cpu"),
        (pretend(load(families[family])), device),
    ):
        torch.manual_seed(0)
        for choice in (options, sampling):
            ids.append(model.generate(**batch.to(place), **choice).cpu())
    assert torch.equal(ids[0], ids[2])
    assert torch.equal(ids[1], ids[3])


@pytest.mark.parametrize("bits", [8, 4])
def test_int8_and_int4_run_there(device, micro, batch, bits):
    expected = quantize(load(micro), bits)(**batch).logits
    logits = pretend(quantize(load(micro), bits))(**batch.to(device)).logits
    assert torch.equal(logits.cpu(), expected)


@pytest.mark.parametrize("change", [encode_short_windows_apart, use_unmasked_attention])
def test_faster_ways_run_there(device, micro, batch, monkeypatch, change):
    monkeypatch.setattr("plumbing.prompt_parts.FIRST_PART", 300)
    monkeypatch.setattr("plumbing.prompt_parts.LATER_PART", 200)
    model = load(micro)
    change(model)
    expected = model.generate(**batch, max_new_tokens=3)
    assert torch.equal(
        pretend(model).generate(**batch.to(device), max_new_tokens=3).cpu(), expected
    )


def test_words_are_timed_there(device):
    processor = AudioFlamingo3Processor.from_pretrained(TINY)
    inputs = processor("Transcribe the input speech.", TINY / "samples" / "digits.wav")
    model = load(TINY)
    ids = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
    expected = align(processor, model, inputs, ids)
    aligned = align(processor, pretend(model), inputs, ids.tolist())
    assert len(expected.words) == 3
    assert aligned.words == expected.words


def test_a_conversation_is_held_there(device, micro, processor, model):
    answers = []
    for talk in (Conversation(processor, model), Conversation(processor, pretend(load(micro)))):
        for text, audios in (("One?", [sound(20000)]), ("Two?", []), ("Three?", [sound(16000)])):
            question = talk.question(text, audios)
            steps = talk.answer(question, max_new_tokens=4, repetition_penalty=1.3)
            answers.append([int(ids) for ids in steps])
    assert answers[:3] == answers[3:]


@pytest.mark.parametrize("choose", [False, True])
def test_many_recordings_are_answered_there(device, clip, tmp_path, choose):
    processor = AudioFlamingo3Processor.from_pretrained(TINY)
    entry = {"audio": clip, "prompt": "What sound is this?", "choices": ["rain", "wind"]}
    (tmp_path / "in.jsonl").write_text(json.dumps(entry))
    outcomes = []
    for model in (load(TINY), pretend(load(TINY))):
        jobs = read_jobs(str(tmp_path / "in.jsonl"), [], "Hi")
        outcomes += answer_jobs(jobs, processor, model, choose=choose, timestamps=not choose)
    assert outcomes[0] == outcomes[1]
    assert "response" in outcomes[0]


def test_a_tensor_left_on_the_cpu_is_noticed(device, micro, batch, monkeypatch):
    arange = torch.arange
    model = pretend(load(micro))
    monkeypatch.setattr(torch, "arange", lambda *numbers, device=None: arange(*numbers))
    with pytest.raises(RuntimeError, match="mixes devices: a tensor .* is on the CPU"):
        model.generate(**batch.to(device), max_new_tokens=1)
