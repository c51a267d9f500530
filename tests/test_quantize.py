"""int8: the decoder's weights in eight bits, close to the answers of the model as it was."""

import weakref

import pytest
import torch

from af3 import AudioFlamingo3ForConditionalGeneration
from conftest import TINY
from extras.quantize import Int8Linear, quantize
from processor import AudioFlamingo3Processor

from_pretrained = AudioFlamingo3ForConditionalGeneration.from_pretrained


def random_tensor(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def new_linear(in_features, out_features, dtype=torch.float32):
    return torch.nn.Linear(in_features, out_features, dtype=dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 8, 9, 300])
def test_an_int8_layer_is_within_one_percent_of_the_linear_layer(tokens, dtype):
    linear = new_linear(192, 20001, dtype)
    x = random_tensor(2, tokens, 192, dtype=dtype)
    expected = linear(x)
    y = Int8Linear(linear)(x)
    assert y.shape == expected.shape
    assert y.dtype == dtype
    assert (y - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("width", [17, 33, 100, 575])
def test_an_int8_layer_of_any_width_is_right_in_bfloat16(width):
    linear = new_linear(width, 65, torch.bfloat16)
    x = random_tensor(1, width, dtype=torch.bfloat16)
    expected = linear(x)
    assert (Int8Linear(linear)(x) - expected).norm() < 0.02 * expected.norm()


def test_a_row_of_zeros_stays_zero_and_a_row_of_whole_steps_is_exact():
    linear = torch.nn.Linear(4, 2, bias=False).requires_grad_(False)
    linear.weight.data = torch.tensor([[0.0, 0, 0, 0], [-127, 1, 64, 0]])
    y = Int8Linear(linear)(torch.eye(4))
    assert torch.equal(y.T, linear.weight)


def test_float16_is_refused_because_its_products_overflow(micro):
    model = from_pretrained(micro, "cpu", "float16")
    with pytest.raises(ValueError, match="without int8, float16"):
        quantize(model)


def test_the_decoders_linear_layers_and_the_head_are_quantised_and_no_other(micro, model):
    expected = set()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith("language_model."):
            expected.add(name)
    quantised_model = quantize(from_pretrained(micro, "cpu"))
    quantised = set()
    for name, module in quantised_model.named_modules():
        if isinstance(module, Int8Linear):
            assert module.weight.dtype == torch.int8
            quantised.add(name)
    assert quantised == expected
    assert len(expected) == 15
    assert quantised_model.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_logits_of_tiny_are_within_two_percent_of_its_own(dtype):
    processor = AudioFlamingo3Processor.from_pretrained(TINY)
    inputs = processor("Transcribe the input speech.", TINY / "samples" / "digits.wav")
    model = from_pretrained(TINY, "cpu", dtype)
    expected = model(**inputs).logits
    logits = quantize(model)(**inputs).logits
    assert logits.dtype == dtype
    assert 0 < (logits - expected).norm() < 0.02 * expected.norm()


def test_weights_leave_memory_when_they_have_been_quantised(micro, monkeypatch):
    weights = []
    alive_counts = []
    quantise_layer = Int8Linear.__init__

    def counting_init(self, linear):
        alive_counts.append(sum(weight() is not None for weight in weights))
        weights.append(weakref.ref(linear.weight))
        quantise_layer(self, linear)

    monkeypatch.setattr(Int8Linear, "__init__", counting_init)
    quantize(from_pretrained(micro, "cpu"))
    assert len(weights) == 15
    assert max(alive_counts) <= 3  # those of the same attention or MLP
