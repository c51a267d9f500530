"""int8 and int4: the decoder's weights in fewer bits, with outputs close to the original."""

import json
import weakref

import pytest
import torch

from af3 import AudioFlamingo3ForConditionalGeneration
from extras import int4
from extras.int4 import Int4Linear, pack, quantize_groups, unpack
from extras.quantize import LAYERS, Int8Linear, load_quantized, quantize, save_quantized
from places import TINY
from processor import AudioFlamingo3Processor
from signals import sound

from_pretrained = AudioFlamingo3ForConditionalGeneration.from_pretrained


def random_tensor(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def quantized(linear, layer_class=Int8Linear):
    layer = layer_class(linear)
    layer.fill(linear.weight)
    if layer_class is Int4Linear:
        layer.repack(int4.operator_block_rows())
    return layer


def new_linear(in_features, out_features, dtype=torch.float32):
    return torch.nn.Linear(in_features, out_features, dtype=dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 8, 9, 300])
def test_an_int8_layer_is_within_one_percent_of_the_linear_layer(tokens, dtype):
    linear = new_linear(192, 20001, dtype)
    x = random_tensor(1, tokens, 192, dtype=dtype)
    expected = linear(x)
    y = quantized(linear)(x)
    assert y.shape == expected.shape
    assert y.dtype == dtype
    assert (y - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("width", [17, 33, 100, 575])
def test_an_int8_layer_of_any_width_is_right_in_bfloat16(width):
    linear = new_linear(width, 65, torch.bfloat16)
    x = random_tensor(1, width, dtype=torch.bfloat16)
    expected = linear(x)
    assert (quantized(linear)(x) - expected).norm() < 0.02 * expected.norm()


def test_a_row_of_zeros_stays_zero_and_a_row_of_whole_steps_is_exact():
    linear = torch.nn.Linear(4, 2, bias=False).requires_grad_(False)
    linear.weight.data = torch.tensor([[0.0, 0, 0, 0], [-127, 1, 64, 0]])
    y = quantized(linear)(torch.eye(4))
    assert torch.equal(y.T, linear.weight)


# The int4 error is 8.5% for normally distributed weights, 6% for nn.Linear's uniform ones.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "width, rows, tokens", [(192, 20001, 1), (192, 20001, 33), (576, 64, 32), (100, 70, 300)]
)
def test_an_int4_layer_is_within_nine_percent_of_the_linear_layer(width, rows, tokens, dtype):
    linear = new_linear(width, rows, dtype)
    x = random_tensor(1, tokens, width, dtype=dtype)
    expected = linear(x)
    y = quantized(linear, Int4Linear)(x)
    assert y.shape == expected.shape
    assert y.dtype == dtype
    assert (y - expected).norm() < 0.09 * expected.norm()


@pytest.mark.parametrize("layer_class", LAYERS.values())
def test_a_quantized_layer_gives_the_same_for_few_and_for_many_tokens(layer_class):
    layer = quantized(new_linear(576, 300), layer_class)
    x = random_tensor(100, 576)
    many = layer(x)
    few = torch.cat([layer(row) for row in x.split(1)])
    assert (few - many).norm() < 0.004 * many.norm()  # bfloat16's rounding, in the operator


def test_int4_weights_that_are_whole_steps_are_exact():
    linear = new_linear(64, 64)
    steps = torch.arange(64 * 64).view(64, 64) % 16
    linear.weight.data = steps * 0.25 - 1.5
    linear.bias = None
    y = quantized(linear, Int4Linear)(torch.eye(64))
    assert torch.equal(y.T, linear.weight)


@pytest.mark.parametrize("value", [0.0, 0.5, -3.0])
def test_int4_weights_that_are_all_equal_are_exact(value):
    linear = new_linear(128, 3)
    linear.weight.data.fill_(value)
    linear.bias = None
    y = quantized(linear, Int4Linear)(torch.eye(128))
    assert torch.equal(y.T, linear.weight)


def test_fitting_the_levels_reduces_the_squared_error_by_more_than_5_percent():
    weights = random_tensor(1000, 64)
    errors = []
    for rounds in (0, 3):
        q, scale, zero = quantize_groups(weights, rounds)
        errors.append(((q.float() - 8) * scale + zero - weights).square().sum())
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize("block_rows", [32, 64])
def test_unpack_inverts_pack(block_rows):
    q = torch.randint(16, (128, 10), dtype=torch.uint8)
    assert torch.equal(unpack(pack(q, block_rows)), q)


def test_int4_layers_work_without_the_operator(monkeypatch):
    linear = new_linear(192, 300)
    x = random_tensor(1, 192)
    expected = quantized(linear, Int4Linear)(x)
    monkeypatch.setattr(int4, "operator_packing", lambda: None)
    y = quantized(linear, Int4Linear)(x)
    assert (y - expected).norm() < 0.004 * expected.norm()


def test_a_model_loaded_in_another_dtype_is_no_larger(saved):
    model, folder = saved
    in_bfloat16 = quantized_bytes(load_quantized(folder, "cpu", "bfloat16"))
    assert in_bfloat16 <= quantized_bytes(model) == quantized_bytes(load_quantized(folder, "cpu"))


def quantized_bytes(model):
    return sum(buffer.nbytes for buffer in model.buffers())


def test_float16_is_refused_when_a_quantized_model_is_loaded(saved):
    with pytest.raises(ValueError, match="without --int8 and --int4, float16"):
        load_quantized(saved[1], "cpu", "float16")


def test_a_quantized_model_takes_and_refuses_the_device_maps_of_any_model(saved):
    for device_map in (None, {"": "cpu"}):
        assert load_quantized(saved[1], device_map=device_map).device == torch.device("cpu")
    for device_map in ("gpu", "balanced"):
        with pytest.raises(ValueError, match="^device.*auto"):
            load_quantized(saved[1], device_map=device_map)


def test_other_bits_are_refused(micro):
    with pytest.raises(ValueError, match="8 or 4 is expected"):
        quantize(from_pretrained(micro, "cpu"), bits=3)


@pytest.mark.parametrize("layer_class", LAYERS.values())
def test_the_layer_that_is_quantized_keeps_its_weight(layer_class):
    linear = torch.nn.Linear(64, 64)
    before = linear.weight.detach().clone()
    layer_class(linear).fill(linear.weight)
    assert torch.equal(linear.weight, before)


@pytest.mark.parametrize("bits", LAYERS)
def test_float16_is_refused_because_its_products_overflow(micro, bits):
    model = from_pretrained(micro, "cpu", "float16")
    with pytest.raises(ValueError, match="without --int8 and --int4, float16"):
        quantize(model, bits)


@pytest.mark.parametrize("bits", LAYERS)
def test_only_the_decoders_linear_layers_and_the_head_are_quantized(micro, model, bits):
    expected = set()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith("language_model."):
            expected.add(name)
    quantized_model = quantize(from_pretrained(micro, "cpu"), bits)
    quantized = set()
    for name, module in quantized_model.named_modules():
        if isinstance(module, LAYERS[bits]):
            quantized.add(name)
    assert quantized == expected
    assert len(expected) == 15
    assert quantized_model.dtype == torch.float32


@pytest.mark.parametrize("layer_class, most", [(Int8Linear, 8.2), (Int4Linear, 4.6)])
def test_a_weight_takes_little_more_than_its_bits(layer_class, most):
    layer = layer_class(new_linear(576, 640, torch.bfloat16))
    num_bytes = sum(buffer.nbytes for buffer in layer.buffers())
    assert 8 * num_bytes < most * 576 * 640


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits, limit", [(8, 0.02), (4, 0.1)])
def test_logits_of_tiny_stay_close(dtype, bits, limit):
    processor = AudioFlamingo3Processor.from_pretrained(TINY)
    inputs = processor("Transcribe the input speech.", TINY / "samples" / "digits.wav")
    model = from_pretrained(TINY, "cpu", dtype)
    expected = model(**inputs).logits
    logits = quantize(model, bits)(**inputs).logits
    assert logits.dtype == dtype
    assert 0 < (logits - expected).norm() < limit * expected.norm()


@pytest.mark.parametrize("bits", LAYERS)
def test_weights_are_freed_once_they_are_quantized(micro, monkeypatch, bits):
    weights = []
    alive_counts = []
    fill = LAYERS[bits].fill

    def counting_fill(self, weight):
        alive_counts.append(sum(earlier() is not None for earlier in weights))
        weights.append(weakref.ref(weight))
        fill(self, weight)

    monkeypatch.setattr(LAYERS[bits], "fill", counting_fill)
    quantize(from_pretrained(micro, "cpu"), bits)
    assert len(weights) == 15
    assert max(alive_counts) <= 3  # those of the same attention or MLP


# ---- Saving and loading ----


@pytest.fixture
def audio_batch(processor):
    return processor("What sound is this?", sound(32000))


@pytest.fixture(params=LAYERS)
def saved(request, micro, tmp_path):
    """A quantized model and the directory that it was saved to."""
    model = quantize(from_pretrained(micro, "cpu"), request.param)
    AudioFlamingo3Processor.from_pretrained(micro).save_pretrained(tmp_path)
    save_quantized(model, tmp_path)
    return model, tmp_path


def test_a_saved_model_is_unchanged_when_loaded(saved, audio_batch):
    model, folder = saved
    loaded = load_quantized(folder, "cpu")
    assert torch.equal(loaded(**audio_batch).logits, model(**audio_batch).logits)


@pytest.mark.parametrize("block_rows", [32, 64])
def test_a_loaded_model_can_be_saved_again(saved, tmp_path, monkeypatch, block_rows):
    _, folder = saved
    monkeypatch.setattr(int4, "operator_packing", lambda: block_rows)
    again = tmp_path / "again"
    load_quantized(folder, "cpu").save_pretrained(again)
    name = "model.safetensors"
    assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_files_do_not_depend_on_the_operators_packing(micro, tmp_path, monkeypatch):
    files = []
    for block_rows in (32, 64):
        monkeypatch.setattr(int4, "operator_packing", lambda rows=block_rows: rows)
        folder = tmp_path / str(block_rows)
        save_quantized(quantize(from_pretrained(micro, "cpu"), bits=4), folder)
        files.append((folder / "model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_a_saved_config_contains_the_quantization(saved):
    _, folder = saved
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "audio-flamingo-3-from-scratch"
    assert config["quantization_config"]["bits"] in LAYERS


def test_other_quantization_methods_are_refused(saved):
    _, folder = saved
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="awq"):
        load_quantized(folder)


def test_a_model_that_is_not_quantized_is_saved_by_save_pretrained(micro, tmp_path):
    with pytest.raises(ValueError, match="save_pretrained"):
        save_quantized(from_pretrained(micro, "cpu"), tmp_path)


# ---- The command line ----


@pytest.mark.parametrize("option", ["--int8", "--int4"])
def test_save_writes_a_directory_for_the_model_option(run, clip, micro, tmp_path, option):
    options = [clip, "Hi", "--max-new-tokens", 5]
    expected = run(*options, option)[1]
    folder = tmp_path / "saved"
    status, out, err = run(option, "--save", folder)
    assert (status, out, err) == (0, "", f"{folder}: give it as --model\n")
    assert run(*options, model=folder)[1] == expected


def test_save_without_quantization_writes_a_plain_checkpoint(run, tmp_path, audio_batch, model):
    run("--save", tmp_path / "saved", "--quiet")
    logits = from_pretrained(tmp_path / "saved", "cpu")(**audio_batch).logits
    assert torch.equal(logits, model(**audio_batch).logits)


@pytest.mark.parametrize("option", ["--int8", "--int4", "--think"])
def test_a_quantized_model_is_not_changed_again(run, clip, saved, option):
    status, _, err = run(clip, "Hi", option, model=saved[1])
    assert status == 2
    assert "is quantized" in err


@pytest.mark.parametrize(
    "words, message",
    [
        (["--save", "x", "What?"], "--save answers nothing"),
        (["--save", ""], "--save is empty"),
        (["--save", ".", "--int4"], "choose a new or an empty directory"),
        (["--save", "x", "--max-new-tokens", "2"], "--save generates nothing"),
        (["--chat", "--batch-size", "0"], "--batch-size is only for JSON lines"),
        (["--save", "x", "--batch-size", "2"], "--batch-size is only for JSON lines"),
        (["--save", "x", "--chat"], "not allowed with"),
        (["--int8", "--int4", "a.wav"], "--int8 and --int4 exclude each other"),
    ],
)
def test_options_that_exclude_each_other_are_refused(run, tmp_path, monkeypatch, words, message):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)  # where --save . would write
    status, _, err = run(*words)
    assert status == 2
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
