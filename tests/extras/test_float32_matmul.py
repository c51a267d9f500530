"""Products in float32 on a CPU without bfloat16 arithmetic: as accurate, weights unchanged."""

import pytest
import torch
import torch.nn.functional as F

from af3 import AudioFlamingo3ForConditionalGeneration
from extras import float32_matmul
from extras.float32_matmul import (
    Float32MatmulConv1d,
    Float32MatmulLinear,
    multiply_in_chunks,
    use_float32_matmul,
)
from places import TINY
from processor import AudioFlamingo3Processor

from_pretrained = AudioFlamingo3ForConditionalGeneration.from_pretrained


@pytest.fixture
def slow_bfloat16(monkeypatch):
    """Simulates a CPU without bfloat16 arithmetic."""
    monkeypatch.setattr(float32_matmul, "is_bfloat16_slow", lambda: True)


def random_tensor(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def with_float32_matmul(layer):
    return use_float32_matmul(torch.nn.Sequential(layer))


@pytest.mark.parametrize("tokens", [1, 31, 32, 500])
def test_a_product_is_as_accurate_as_before(slow_bfloat16, monkeypatch, tokens):
    linear = torch.nn.Linear(192, 20001, dtype=torch.bfloat16).requires_grad_(False)
    x = random_tensor(1, tokens, 192)
    exact = F.linear(x.double(), linear.weight.double(), linear.bias.double())
    before = linear(x)
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return multiply_in_chunks(*arguments)

    monkeypatch.setattr(float32_matmul, "multiply_in_chunks", counted)
    y = with_float32_matmul(linear)(x)
    assert bool(calls) == (tokens >= 32)
    assert y.dtype == torch.bfloat16
    assert y.shape == before.shape
    assert (y - exact).norm() < 1.2 * (before - exact).norm()


def test_a_convolution_is_as_accurate_as_before(slow_bfloat16):
    conv = torch.nn.Conv1d(80, 96, 3, stride=2, padding=1, dtype=torch.bfloat16)
    conv.requires_grad_(False)
    x = random_tensor(2, 80, 101)
    exact = F.conv1d(x.double(), conv.weight.double(), conv.bias.double(), stride=2, padding=1)
    before = conv(x)
    y = with_float32_matmul(conv)(x)
    assert y.dtype == torch.bfloat16
    assert (y - exact).norm() < 1.05 * (before - exact).norm()


def test_logits_are_as_close_to_float32_as_before(slow_bfloat16):
    processor = AudioFlamingo3Processor.from_pretrained(TINY)
    inputs = processor("Transcribe the input speech.", TINY / "samples" / "digits.wav")
    exact = from_pretrained(TINY, "cpu")(**inputs).logits
    model = from_pretrained(TINY, "cpu", "bfloat16")
    before = model(**inputs).logits
    logits = use_float32_matmul(model)(**inputs).logits
    assert not torch.equal(logits, before)
    assert (logits - exact).norm() < 1.1 * (before - exact).norm()


def test_weights_keep_their_names_and_are_not_copied(slow_bfloat16, micro):
    model = from_pretrained(micro, "cpu", "bfloat16")
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    use_float32_matmul(model)
    after = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert after == before


def test_encoder_projector_and_decoder_are_changed(slow_bfloat16, micro):
    model = use_float32_matmul(from_pretrained(micro, "cpu", "bfloat16"))
    kinds = {type(module) for module in model.modules()}
    assert {Float32MatmulLinear, Float32MatmulConv1d} <= kinds
    assert not {torch.nn.Linear, torch.nn.Conv1d} & kinds


@pytest.mark.parametrize("is_slow, dtype", [(False, "bfloat16"), (True, "float32")])
def test_other_cpus_and_other_dtypes_keep_their_layers(monkeypatch, micro, is_slow, dtype):
    monkeypatch.setattr(float32_matmul, "is_bfloat16_slow", lambda: is_slow)
    model = use_float32_matmul(from_pretrained(micro, "cpu", dtype))
    kinds = {type(module) for module in model.modules()}
    assert not {Float32MatmulLinear, Float32MatmulConv1d} & kinds


def test_each_chunk_is_multiplied_in_float32_before_the_next_is_taken(slow_bfloat16, monkeypatch):
    events = []
    linear = F.linear

    def recording_linear(x, weight):
        events.append(weight.dtype)
        return linear(x, weight)

    def chunks():
        for chunk in random_tensor(100, 64).split(30):
            events.append("chunk")
            yield chunk

    monkeypatch.setattr(F, "linear", recording_linear)
    multiply_in_chunks(random_tensor(40, 64), chunks())
    assert events == ["chunk", torch.float32] * 4


@pytest.mark.parametrize("in_bfloat16, in_float32, is_slow", [(3, 2, True), (2, 3, False)])
def test_bfloat16_is_slow_if_it_takes_longer(monkeypatch, in_bfloat16, in_float32, is_slow):
    times = iter([in_bfloat16, in_float32] * 5)
    monkeypatch.setattr(float32_matmul, "seconds", lambda function: next(times))
    assert float32_matmul.is_bfloat16_slow.__wrapped__() == is_slow
