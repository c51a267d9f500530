"""Adapters: they are merged in every naming of the tensors, and other kinds are refused by name.

The logits and the names of peft are in tests/parity/.
"""

import os
import shutil
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters import TARGETS, with_factors
from af3 import AudioFlamingo3ForConditionalGeneration
from checkpoints import change_json, read_json, write_original
from extras.lora import (
    DECODER_LINEARS,
    add_factors,
    choose_layers,
    find_think_adapter,
    merge_adapter,
    save_adapter,
)
from extras.quantize import quantize
from places import DATA
from plumbing.check_adapter import (
    SUPPORTED,
    UNSUPPORTED,
    USED,
    WITHOUT_EFFECT,
    check_adapter_config,
    flat_fields,
)
from signals import conversation, sound

FACTORS = "adapter_model.safetensors"
OTHERS = "non_lora_trainables.bin"
DECODER = "base_model.model.model.language_model"


@pytest.fixture
def checkpoint(spoiled):
    """A checkpoint with an adapter in think/, as peft saved it."""
    shutil.copytree(DATA / "think", spoiled / "think")
    return spoiled


@pytest.fixture
def batch(processor):
    chat = conversation(sound(80000))
    return processor.apply_chat_template(chat, add_generation_prompt=True)


def load(folder):
    return AudioFlamingo3ForConditionalGeneration.from_pretrained(folder, "cpu")


def load_merged(folder):
    return merge_adapter(load(folder), find_think_adapter(folder))


def change_tensors(path, changes):
    if path.suffix == ".safetensors":
        save_file(load_file(path) | changes, path)
    else:
        torch.save(torch.load(path) | changes, path)


# ---- Numbers ----


def test_a_tensor_trained_beside_the_adapter_replaces_the_models_own(checkpoint):
    bias = load_merged(checkpoint).multi_modal_projector.linear_1.bias
    assert torch.equal(bias, torch.linspace(-1, 1, len(bias)))


def test_the_merge_is_computed_in_float32_and_rounded_once(checkpoint):
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    exact = load_merged(checkpoint).state_dict()[name]
    model = load(checkpoint).bfloat16()
    original = model.state_dict()[name].float()
    factors = load_file(checkpoint / "think" / FACTORS)
    a = factors[f"{DECODER}.layers.0.self_attn.q_proj.lora_A.weight"]
    b = factors[f"{DECODER}.layers.0.self_attn.q_proj.lora_B.weight"]
    merge_adapter(model, find_think_adapter(checkpoint))
    scale = 3  # lora_alpha / rank = 6 / 2
    assert torch.equal(model.state_dict()[name], (original + scale * b @ a).bfloat16())
    assert not torch.equal(exact.bfloat16(), original.bfloat16())


def test_a_merged_model_has_one_dtype_and_needs_no_gradients(checkpoint):
    model = merge_adapter(load(checkpoint).bfloat16(), find_think_adapter(checkpoint))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_merged_model_can_be_quantized(checkpoint, batch):
    model = load_merged(checkpoint)
    expected = model(**batch).logits
    logits = quantize(model)(**batch).logits
    assert 0 < (logits - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("empty_file", [False, True])
def test_an_adapter_of_factors_alone_needs_no_other_file(checkpoint, tmp_path, empty_file):
    folder = shutil.copytree(checkpoint / "think", tmp_path / "adapter")
    if empty_file:
        torch.save({}, folder / OTHERS)
    else:
        (folder / OTHERS).unlink()
    merged = merge_adapter(load(checkpoint), folder)
    think_weights = load_merged(checkpoint).state_dict()
    others = torch.load(checkpoint / "think" / OTHERS)
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, think_weights[name]) != (name in others), name


def test_factors_are_added_to_a_full_weight_in_the_adapter(checkpoint):
    """As peft saves an lm_head with factors."""
    whole = {"base_model.model.lm_head.base_layer.weight": torch.full((647, 48), 0.5)}
    a = torch.randn(2, 48)
    b = torch.randn(647, 2)
    whole |= {"base_model.model.lm_head.lora_A.weight": a}
    whole |= {"base_model.model.lm_head.lora_B.weight": b}
    change_tensors(checkpoint / "think" / FACTORS, whole)
    weight = load_merged(checkpoint).language_model.lm_head.weight
    torch.testing.assert_close(weight, 0.5 + 3 * b @ a)  # lora_alpha / rank = 6 / 2


def test_several_adapters_add_up(checkpoint):
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    folder = find_think_adapter(checkpoint)
    original = load(checkpoint).state_dict()[name]
    once = load_merged(checkpoint).state_dict()[name]
    twice = merge_adapter(load_merged(checkpoint), folder).state_dict()[name]
    torch.testing.assert_close(twice - once, once - original)


def save_with_head(checkpoint, folder, fill):
    """Saves an adapter of lm_head as peft does, with a copy of its weight beside the factors."""
    shutil.copytree(checkpoint / "think", folder)
    (folder / OTHERS).unlink()
    head = "base_model.model.lm_head"
    factors = {f"{head}.lora_A.weight": torch.full((2, 48), fill)}
    factors |= {f"{head}.lora_B.weight": torch.ones(647, 2)}
    copy = load(checkpoint).language_model.lm_head.weight.data
    save_file(factors | {f"{head}.base_layer.weight": copy}, folder / FACTORS)
    return folder


def test_the_copy_of_a_weight_in_a_second_adapter_does_not_undo_the_first(checkpoint, tmp_path):
    first = save_with_head(checkpoint, tmp_path / "first", 0.1)
    second = save_with_head(checkpoint, tmp_path / "second", 0.2)
    model = merge_adapter(load(checkpoint), first)
    weight = merge_adapter(model, second).language_model.lm_head.weight
    original = load(checkpoint).language_model.lm_head.weight
    torch.testing.assert_close(weight, original + 6 * (0.1 + 0.2))  # 3 * 2 rows of 0.1 and 0.2


def test_a_weight_of_an_earlier_adapter_is_not_replaced_by_another(checkpoint, micro, tmp_path):
    save_adapter(with_factors(micro), tmp_path)
    whole = {"base_model.model.lm_head.weight": torch.zeros(647, 48)}
    change_tensors(checkpoint / "think" / FACTORS, whole)
    earlier = merge_adapter(load(micro), tmp_path)
    with pytest.raises(ValueError, match="lm_head.weight was changed by an earlier adapter"):
        merge_adapter(earlier, checkpoint / "think")
    assert_same_tensors(earlier, merge_adapter(load(micro), tmp_path))
    both = merge_adapter(merge_adapter(load(micro), checkpoint / "think"), tmp_path)
    assert both.language_model.lm_head.weight.abs().max() > 0.1  # the zeros and an update


def test_an_adapter_of_one_dtype_is_merged_into_a_model_of_another(checkpoint):
    expected = load_merged(checkpoint)
    path = checkpoint / "think" / FACTORS
    save_file({name: tensor.double() for name, tensor in load_file(path).items()}, path)
    half = merge_adapter(load(checkpoint).half(), checkpoint / "think")
    for name, tensor in half.state_dict().items():
        assert tensor.dtype == torch.float16
        torch.testing.assert_close(tensor.float(), expected.state_dict()[name], atol=2e-3, rtol=0)


def test_an_older_adapter_is_a_pickle(checkpoint):
    expected = load_merged(checkpoint)
    path = checkpoint / "think" / FACTORS
    torch.save(load_file(path), checkpoint / "think" / "adapter_model.bin")
    path.unlink()
    assert_same_tensors(load_merged(checkpoint), expected)


# ---- Names and places ----


def hub_name(name):
    name = name.replace("base_model.model.model.", "base_model.model.")
    return name.replace("model.language_model.", "model.language_model.model.")


def original_name(name):
    name = hub_name(name)
    name = name.replace("language_model.", "llm.")
    name = name.replace("multi_modal_projector", "sound_mm_projector")
    return name.replace("linear_1", "layers.0").replace("linear_2", "layers.2")


def rename(adapter, new_name):
    """Renames the tensors of an adapter."""
    factors = load_file(adapter / FACTORS)
    factors = {new_name(name): tensor for name, tensor in factors.items()}
    save_file(factors, adapter / FACTORS)
    others = torch.load(adapter / OTHERS)
    others = {new_name(f"base_model.model.model.{name}"): others[name] for name in others}
    torch.save(others, adapter / OTHERS)


NAMINGS = {
    "transformers_5": lambda name: name,
    "hub": hub_name,
    "hub_without_prefix": lambda name: hub_name(name).removeprefix("base_model.model."),
    "original": original_name,
    "original_without_prefix": lambda name: original_name(name).removeprefix("base_model.model."),
}


def assert_same_tensors(model, other):
    tensors = other.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_of_the_tensors_is_read(checkpoint, naming):
    expected = load_merged(checkpoint)
    rename(checkpoint / "think", NAMINGS[naming])
    assert_same_tensors(load_merged(checkpoint), expected)


def test_the_adapter_of_the_original_layout_is_in_stage35(checkpoint, micro, tmp_path):
    write_original(micro, tmp_path / "af3")
    shutil.copytree(checkpoint / "think", tmp_path / "af3" / "stage35")
    rename(tmp_path / "af3" / "stage35", original_name)
    assert_same_tensors(load_merged(tmp_path / "af3"), load_merged(checkpoint))


LINEAR_1 = "base_model.model.model.multi_modal_projector.linear_1"


@pytest.mark.parametrize("part", ["", "modules_to_save.", "modules_to_save.default."])
def test_a_module_trained_in_full_is_read_in_every_naming(checkpoint, part):
    change_json(checkpoint / "think" / "adapter_config.json", modules_to_save=["linear_1"])
    (checkpoint / "think" / OTHERS).unlink()
    trained = {f"{LINEAR_1}.{part}weight": torch.ones(48, 32)}
    trained |= {f"{LINEAR_1}.{part}bias": torch.ones(48)}
    change_tensors(checkpoint / "think" / FACTORS, trained)
    layer = merge_adapter(load(checkpoint), checkpoint / "think").multi_modal_projector.linear_1
    assert torch.equal(layer.weight, torch.ones(48, 32))
    assert torch.equal(layer.bias, torch.ones(48))


def test_the_frozen_copy_of_a_module_trained_in_full_is_not_used(checkpoint):
    """peft saves all three with bias="all"."""
    (checkpoint / "think" / OTHERS).unlink()
    biases = {f"{LINEAR_1}.bias": torch.ones(48)}
    biases |= {f"{LINEAR_1}.modules_to_save.bias": torch.ones(48)}
    biases |= {f"{LINEAR_1}.original_module.bias": torch.zeros(48)}
    change_tensors(checkpoint / "think" / FACTORS, biases)
    merged = merge_adapter(load(checkpoint), checkpoint / "think")
    assert torch.equal(merged.multi_modal_projector.linear_1.bias, torch.ones(48))


# ---- Unmerged and saved factors ----


def test_new_factors_change_nothing(model, micro, batch):
    with_new_factors = load(micro)
    for name in choose_layers(with_new_factors, TARGETS, projector=True):
        add_factors(with_new_factors, name, rank=2, alpha=6)
    assert torch.equal(with_new_factors(**batch).logits, model(**batch).logits)


def test_factors_are_in_float32_over_a_weight_in_the_checkpoints_dtype(micro):
    model = load(micro).bfloat16().requires_grad_(False)
    add_factors(model, "language_model.lm_head", rank=2, alpha=6)
    layer = model.language_model.lm_head
    layer.lora_B.data.fill_(1)
    assert (layer.lora_A.dtype, layer.linear.weight.dtype) == (torch.float32, torch.bfloat16)
    assert layer(torch.ones(3, 48).bfloat16()).dtype == torch.bfloat16
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == ["language_model.lm_head.lora_A", "language_model.lm_head.lora_B"]


@pytest.mark.parametrize(
    "targets, projector, count",
    [
        (DECODER_LINEARS, False, 14),  # 7 in each of two layers
        (("q_proj", "lm_head"), False, 3),
        (("q_proj",), True, 4),
    ],
)
def test_only_layers_of_decoder_and_projector_are_chosen(model, targets, projector, count):
    names = choose_layers(model, targets, projector)
    assert len(names) == count
    assert not any(name.startswith("audio_tower") for name in names)


# ---- Faults ----


def assert_refused(checkpoint, match):
    """Asserts that the adapter is refused with such an error, and that the model is unchanged."""
    model = load(checkpoint).requires_grad_(True)
    with pytest.raises((ValueError, FileNotFoundError), match=match) as caught:
        merge_adapter(model, checkpoint / "think")
    assert "\n" not in str(caught.value)
    assert_same_tensors(model, load(checkpoint))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    "file, name",
    [
        (FACTORS, "base_model.model.bogus.weight"),
        (FACTORS, f"{DECODER}.layers.0.self_attn.q_proj.lora_magnitude_vector"),
        (FACTORS, f"{DECODER}.layers.0.self_attn.q_proj.lora_A.default.weight"),
        (FACTORS, f"{LINEAR_1}.original_module.bias"),
        (OTHERS, "model.audio_tower.layers.7.fc1.bias"),
    ],
)
def test_a_tensor_without_a_place_in_the_model_is_reported(checkpoint, file, name):
    change_tensors(checkpoint / "think" / file, {name: torch.zeros(2, 48)})
    assert_refused(checkpoint, f"no place in the model for {name}")


@pytest.mark.parametrize("layer", ["layers.9.self_attn.q_proj", "layers.0.mlp.experts"])
def test_factors_of_a_layer_that_does_not_exist_are_reported(checkpoint, layer):
    factors = {f"{DECODER}.{layer}.lora_A.weight": torch.zeros(2, 48)}
    factors |= {f"{DECODER}.{layer}.lora_B.weight": torch.zeros(48, 2)}
    change_tensors(checkpoint / "think" / FACTORS, factors)
    assert_refused(checkpoint, f"no place in the model for {DECODER}.{layer}.lora_A.weight")


V_PROJ = f"{DECODER}.layers.1.self_attn.v_proj"


@pytest.mark.parametrize("missing", ["lora_A.weight", "lora_B.weight"])
def test_a_factor_without_the_other_is_reported(checkpoint, missing):
    path = checkpoint / "think" / FACTORS
    factors = load_file(path)
    del factors[f"{V_PROJ}.{missing}"]
    save_file(factors, path)
    assert_refused(checkpoint, f"but not {V_PROJ}.{missing}")


def test_two_tensors_for_one_weight_are_reported_if_they_differ(checkpoint):
    hub_bias = {"multi_modal_projector.linear_1.bias": torch.zeros(48)}
    change_tensors(checkpoint / "think" / FACTORS, {f"{LINEAR_1}.bias": torch.ones(48)} | hub_bias)
    assert_refused(checkpoint, "are for the same weight, and differ")


def test_a_missing_module_to_save_is_reported(checkpoint):
    change_json(checkpoint / "think" / "adapter_config.json", modules_to_save=["embed_tokens"])
    assert_refused(checkpoint, "modules_to_save is for embed_tokens, but no tensor of it is inside")


def test_a_quantized_model_is_refused(checkpoint):
    with pytest.raises(ValueError, match="the model is quantized; merge its adapters before"):
        merge_adapter(quantize(load(checkpoint)), checkpoint / "think")


def test_a_tensor_of_another_shape_is_reported_with_its_name(checkpoint):
    others = {"multi_modal_projector.linear_1.bias": torch.zeros(7)}
    torch.save(others, checkpoint / "think" / OTHERS)
    assert_refused(checkpoint, r"multi_modal_projector.linear_1.bias.*\[7\].*\[48\]")


A = f"{V_PROJ}.lora_A.weight"
B = f"{V_PROJ}.lora_B.weight"


@pytest.mark.parametrize(
    "file, changes, reported",
    [
        (FACTORS, {A: torch.zeros(0, 48), B: torch.zeros(24, 0)}, "rank 0"),
        (FACTORS, {A: torch.zeros(3, 48), B: torch.zeros(24, 3)}, "rank 3"),
        (FACTORS, {A: torch.zeros(3, 48)}, "lora_B"),
        (FACTORS, {A: torch.zeros(2, 47)}, "lora_A"),
        (FACTORS, {A: torch.zeros(2, 48, 1)}, "lora_A"),
        (FACTORS, {A: torch.zeros(())}, "lora_A"),
        (FACTORS, {A: torch.zeros(2, 48, dtype=torch.complex64)}, "lora_A"),
        (FACTORS, {A: torch.zeros(2, 48, dtype=torch.int64)}, "lora_A"),
        (FACTORS, {A: torch.full((2, 48), float("nan"))}, "lora_A.weight has values that are"),
        (OTHERS, {5: torch.zeros(1)}, OTHERS),
        (OTHERS, {"multi_modal_projector.linear_2.weight": "words"}, "linear_2.weight"),
        (OTHERS, {"multi_modal_projector.linear_1.bias": 7}, "linear_1.bias"),
    ],
)
def test_a_damaged_adapter_is_reported_with_its_path(checkpoint, file, changes, reported):
    change_tensors(checkpoint / "think" / file, changes)
    assert_refused(checkpoint, f"think.*{reported}")


def test_an_adapter_without_tensors_is_reported(checkpoint):
    save_file({}, checkpoint / "think" / FACTORS)
    assert_refused(checkpoint, f"{FACTORS}: no tensors inside")


@pytest.mark.parametrize("file", [FACTORS, OTHERS, "adapter_config.json"])
def test_a_missing_or_truncated_file_is_reported(checkpoint, file):
    path = checkpoint / "think" / file
    path.write_bytes(path.read_bytes()[:60])
    assert_refused(checkpoint, file)
    path.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=file):
        load_merged(checkpoint)


# ---- Other kinds of adapters ----


@pytest.mark.parametrize(
    "field, value",
    [
        ("peft_type", "LOHA"),
        ("peft_type", None),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("use_dora", True),
        ("lora_bias", True),
        ("alora_invocation_tokens", [5, 6]),
        ("trainable_token_indices", [5, 6]),
        ("target_parameters", ["lm_head.weight"]),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("megatron_config", {"tp": 2}),
        ("arrow_config", {"top_k": 3}),
        ("bias", "some"),
        ("a_later_field", 0.5),
        ("a_later_field", 0),
        ("eva_config", {"rho": 2.0, "a_later_field": True}),
        ("runtime_config", {"a_later_field": True}),
        ("lora_alpha", None),
        ("lora_alpha", float("nan")),
        ("lora_alpha", "16"),
        ("r", 0),
        ("use_rslora", "yes"),
        ("rank_pattern", {"q_proj": 2.5}),
        ("alpha_pattern", {"q_proj": -1}),
        ("alpha_pattern", {"q_proj(": 3}),
        ("alpha_pattern", [3]),
        ("modules_to_save", "linear_1"),
    ],
)
def test_another_kind_of_adapter_is_refused_by_field(checkpoint, field, value):
    change_json(checkpoint / "think" / "adapter_config.json", **{field: value})
    assert_refused(checkpoint, f"adapter_config.json: .*{field}")


@pytest.mark.parametrize("value", [None, False, [], {}])
def test_an_unknown_field_that_is_not_set_is_accepted(checkpoint, value):
    expected = load_merged(checkpoint)
    change_json(checkpoint / "think" / "adapter_config.json", a_later_field=value)
    assert_same_tensors(load_merged(checkpoint), expected)


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def test_every_field_of_pefts_configuration_is_known(peft):
    config = asdict(peft.LoraConfig(init_lora_weights="eva", eva_config=peft.EvaConfig()))
    known = {"peft_type", *USED, *WITHOUT_EFFECT, *SUPPORTED, *UNSUPPORTED}
    assert {field for field, _ in flat_fields(config)} <= known


@pytest.mark.parametrize("targets", [["q_proj"], "all-linear", r".*\.q_proj", None])
def test_the_default_configuration_of_peft_is_accepted(peft, tmp_path, targets):
    peft.LoraConfig(target_modules=targets).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    check_adapter_config(read_json(path), path)


def test_every_field_of_peft_that_changes_the_merge_is_refused_if_it_is_set(peft, tmp_path):
    peft.LoraConfig().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = read_json(path)
    for field in config.keys() - WITHOUT_EFFECT:
        with pytest.raises(ValueError, match=f"adapter_config.json: .*{field}"):
            check_adapter_config(config | {field: "a new value"}, path)


class Trap:
    """Makes a directory when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("trapped",)


def test_a_pickle_that_would_run_code_is_refused(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    others = {"multi_modal_projector.linear_1.bias": Trap()}
    torch.save(others, checkpoint / "think" / OTHERS)
    with pytest.raises(ValueError, match=OTHERS):
        load_merged(checkpoint)
    assert not (tmp_path / "trapped").exists()


# ---- The command line ----


def test_think_merges_the_adapter_of_the_model(checkpoint, run, clip):
    options = ["--max-new-tokens", 16, "--quiet"]
    _, plain, _ = run(clip, "Hi", *options, model=checkpoint)
    status, answer, _ = run(clip, "Hi", *options, "--think", model=checkpoint)
    assert status == 0
    assert answer != plain


def test_adapter_merges_the_one_in_a_directory_and_may_be_repeated(checkpoint, run, clip):
    options = ["--max-new-tokens", 16, "--quiet"]
    adapter = ["--adapter", checkpoint / "think"]
    _, with_think, _ = run(clip, "Hi", *options, "--think", model=checkpoint)
    _, once, _ = run(clip, "Hi", *options, *adapter, model=checkpoint)
    _, twice, _ = run(clip, "Hi", *options, *adapter, *adapter, model=checkpoint)
    _, both, _ = run(clip, "Hi", *options, *adapter, "--think", model=checkpoint)
    assert once == with_think
    assert twice == both != once


def test_another_kind_of_adapter_is_an_error_of_one_line(checkpoint, run, clip):
    change_json(checkpoint / "think" / "adapter_config.json", init_lora_weights="pissa")
    status, out, err = run(clip, "Hi", "--adapter", checkpoint / "think", model=checkpoint)
    assert (status, out) == (2, "")
    assert 'init_lora_weights is "pissa", which is not supported' in err
    assert err.count("\n") == 1


def test_a_missing_adapter_is_refused(run, clip):
    status, out, err = run(clip, "Hi", "--adapter", "nowhere")
    assert (status, out) == (2, "")
    assert err == "error: nowhere: no such directory; an adapter is expected.\n"


def test_think_without_an_adapter_is_refused(run, clip):
    status, out, err = run(clip, "Hi", "--think")
    assert (status, out) == (2, "")
    assert "think: no such directory; the AF-Think adapter is expected" in err
    assert err.count("\n") == 1


def test_an_adapter_given_as_the_model_is_refused(run, clip, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    status, _, err = run(clip, "Hi", model=tmp_path)
    assert status == 2
    assert "a LoRA adapter; give it as --adapter" in err
