"""save_pretrained writes what from_pretrained reads, and never leaves half a checkpoint.

That transformers gives the same answer with it is asserted by make_adapter_goldens.py.
"""

import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import random_checkpoint
from af3 import AudioFlamingo3ForConditionalGeneration
from checkpoints import read_json, write_original, write_sharded
from extras.lora import add_factors, save_adapter
from extras.quantize import quantize, save_quantized
from memory import at_most
from places import TINY
from plumbing import save_checkpoint
from plumbing.replace_file import replace_file
from plumbing.save_checkpoint import save_model
from processor import AudioFlamingo3Processor
from signals import conversation, sound


def load(folder, dtype="auto"):
    return AudioFlamingo3ForConditionalGeneration.from_pretrained(folder, "cpu", dtype)


def assert_same_tensors(model, other):
    tensors = other.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name


@pytest.fixture
def saved(model, processor, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


# ---- What is written ----


def test_a_saved_model_is_loaded_unchanged(saved, model):
    again = load(saved)
    assert_same_tensors(again, model)
    assert again.config == model.config
    assert again.generation_config == model.generation_config


@pytest.mark.parametrize("top_k", [None, 0, 7, 50])
def test_a_saved_limit_of_sampling_is_the_same_when_it_is_loaded(spoiled, top_k):
    model = load(spoiled)
    model.generation_config.top_k = top_k
    model.save_pretrained(spoiled)
    assert (load(spoiled).generation_config.top_k or 0) == (top_k or 0)


def test_a_processor_saved_alone_is_loaded_again(processor, music_flamingo, tmp_path):
    for number, original in enumerate(
        [processor, AudioFlamingo3Processor.from_pretrained(music_flamingo)]
    ):
        original.save_pretrained(tmp_path / str(number))
        again = AudioFlamingo3Processor.from_pretrained(tmp_path / str(number))
        expected = original("Hi", sound(20000))["input_ids"]
        assert torch.equal(again("Hi", sound(20000))["input_ids"], expected)
        assert again.max_samples == original.max_samples


def test_a_saved_processor_returns_the_same_tensors(saved, processor):
    again = AudioFlamingo3Processor.from_pretrained(saved)
    chat = conversation(sound(20000))
    expected = processor.apply_chat_template(chat, add_generation_prompt=True)
    batch = again.apply_chat_template(chat, add_generation_prompt=True)
    assert again.max_samples == processor.max_samples
    for name, tensor in expected.items():
        assert torch.equal(batch[name], tensor)


def test_the_configuration_of_the_checkpoint_is_saved_unchanged_except_for_the_dtype(
    micro, processor, tmp_path
):
    load(micro, "bfloat16").save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    expected = read_json(micro / "config.json") | {"dtype": "bfloat16"}
    assert read_json(tmp_path / "config.json") == expected
    assert load(tmp_path).dtype == torch.bfloat16


def test_tensors_have_the_names_of_the_hub_layout(saved, micro):
    assert set(load_file(saved / "model.safetensors")) == set(
        load_file(micro / "model.safetensors")
    )


def test_the_original_layout_is_saved_in_the_hub_layout(micro, tmp_path, model):
    write_original(micro, tmp_path / "original")
    original = load(tmp_path / "original")
    original.save_pretrained(tmp_path / "hub")
    processor = AudioFlamingo3Processor.from_pretrained(tmp_path / "original")
    processor.save_pretrained(tmp_path / "hub")
    assert_same_tensors(load(tmp_path / "hub"), model)
    assert load(tmp_path / "hub").config == model.config
    for name in ("processor_config.json", "chat_template.jinja"):
        assert (tmp_path / "hub" / name).read_text() == (TINY / name).read_text()


def test_the_current_generation_options_are_saved(spoiled):
    model = load(spoiled)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(spoiled)
    assert load(spoiled).generation_config.max_new_tokens == 7


# ---- Shards ----


def test_large_weights_are_divided_into_shards_with_an_index(model, processor, tmp_path):
    save_model(model, tmp_path, max_shard_bytes=100_000)
    processor.save_pretrained(tmp_path)
    index = read_json(tmp_path / "model.safetensors.index.json")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 5
    assert {path.name for path in shards} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in model.state_dict().values())
    for shard in shards:
        tensors = load_file(shard)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 100_000
    assert_same_tensors(load(tmp_path), model)


def test_new_weights_replace_existing_shards(spoiled, model):
    write_sharded(spoiled)
    changed = load(spoiled)
    changed.requires_grad_(False).multi_modal_projector.linear_1.bias.fill_(7)
    changed.save_pretrained(spoiled)
    assert [path.name for path in spoiled.glob("*.safetensors*")] == ["model.safetensors"]
    assert (load(spoiled).multi_modal_projector.linear_1.bias == 7).all()


def test_a_model_can_overwrite_the_files_that_it_is_memory_mapped_from(spoiled, model):
    loaded = load(spoiled)
    loaded.save_pretrained(spoiled)
    assert_same_tensors(loaded, model)
    assert_same_tensors(load(spoiled), model)


def test_a_full_disk_is_reported_with_the_directory_and_the_old_files_remain(
    micro, tmp_path, monkeypatch
):
    load(micro).save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def fail(*_, **__):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(save_checkpoint, "save_file", fail)
    with pytest.raises(OSError, match=f"{tmp_path}: No space left"):
        load(micro).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert not (tmp_path / ".saving").exists()


def test_weight_files_with_other_names_are_kept(micro, tmp_path):
    (tmp_path / "model-best.safetensors").touch()
    (tmp_path / "model-00001-of-00002.safetensors").touch()  # from an earlier checkpoint
    load(micro).save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.glob("*.safetensors")}
    assert names == {"model-best.safetensors", "model.safetensors"}


def test_saving_does_not_copy_the_weights_in_memory(micro, tmp_path):
    model = load(micro)
    head = model.language_model.lm_head
    head.weight = torch.nn.Parameter(torch.ones(len(head.weight), 40_000))  # 104 MB
    with at_most(head.weight.nbytes // 2):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size > 100e6


# ---- Modes of files ----


@pytest.fixture(params=[0o022, 0o027])
def umask(request):
    """Sets the umask of a test."""
    if os.name == "nt":
        pytest.skip("Windows has no umask")
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes_in(folder):
    return {path.stat().st_mode & 0o777 for path in folder.iterdir() if path.is_file()}


def test_all_files_have_the_mode_that_the_umask_gives(umask, micro, processor, tmp_path):
    load(micro).save_pretrained(tmp_path / "one")
    processor.save_pretrained(tmp_path / "one")
    save_model(load(micro), tmp_path / "shards", max_shard_bytes=100_000)
    save_quantized(quantize(load(micro)), tmp_path / "int8")
    random_checkpoint.copy_words(TINY, tmp_path / "random", small=True)
    random_checkpoint.write_random_weights(tmp_path / "random", torch.float32, seed=0)
    replace_file(tmp_path / "page.html", "page")
    for folder in (tmp_path, *(path for path in tmp_path.iterdir() if path.is_dir())):
        assert modes_in(folder) == {0o666 & ~umask}, folder


def test_an_adapter_has_the_mode_that_the_umask_gives(umask, micro, tmp_path):
    model = load(micro)
    add_factors(model, "language_model.lm_head", rank=2, alpha=4)
    save_adapter(model, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert modes_in(tmp_path) == {0o666 & ~umask}


def test_a_file_that_is_replaced_keeps_its_mode(umask, micro, tmp_path):
    load(micro).save_pretrained(tmp_path)
    replace_file(tmp_path / "page.html", "old")
    for path in tmp_path.iterdir():
        path.chmod(0o660)
    load(micro).save_pretrained(tmp_path)
    replace_file(tmp_path / "page.html", "new")
    assert modes_in(tmp_path) == {0o660}


# ---- Interruptions ----


@pytest.mark.parametrize("moves", range(3))
def test_an_interrupted_save_does_not_leave_half_a_checkpoint(spoiled, monkeypatch, moves):
    """Three files are moved, config.json last; the save is interrupted after `moves` of them."""
    model = load(spoiled)
    done = []

    def replace(source, destination):
        if len(done) == moves:
            raise KeyboardInterrupt
        done.append(os.rename(source, destination))

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(spoiled)
    with pytest.raises(FileNotFoundError, match="no config.json inside"):
        load(spoiled)


def test_a_save_that_fails_while_writing_leaves_the_checkpoint_unchanged(
    spoiled, model, monkeypatch
):
    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("plumbing.save_checkpoint.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        load(spoiled).save_pretrained(spoiled)
    assert_same_tensors(load(spoiled), model)
    assert not (spoiled / ".saving").exists()


def test_files_left_by_a_killed_save_are_removed(spoiled, model):
    (spoiled / ".saving").mkdir()
    (spoiled / ".saving" / "model-00001-of-00009.safetensors").write_text("half")
    load(spoiled).save_pretrained(spoiled)
    assert_same_tensors(load(spoiled), model)
    assert not (spoiled / ".saving").exists()


def test_weights_that_windows_does_not_let_go_leave_the_checkpoint_as_it_was(
    spoiled, model, monkeypatch
):
    """On Windows, a file that is memory-mapped cannot be removed or replaced."""
    write_sharded(spoiled)
    loaded = load(spoiled)
    remove = Path.unlink

    def unlink(path, missing_ok=False):
        if path.parent == spoiled and path.suffix == ".safetensors":
            raise PermissionError(13, "Permission denied", str(path))
        remove(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(PermissionError):
        loaded.save_pretrained(spoiled)
    assert_same_tensors(load(spoiled), model)


# ---- Faults ----


def test_a_quantized_model_is_refused(spoiled, tmp_path):
    with pytest.raises(ValueError, match="scale: .* before it is quantized"):
        quantize(load(spoiled)).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_name_that_safetensors_cannot_open_is_refused(run, micro, tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    status, _, err = run("--save", folder)
    assert (status, folder.exists()) == (2, False)
    assert "caf\\udce9: not a UTF-8 name, which files of weights need" in err


def test_a_directory_in_the_original_layout_and_a_file_are_refused(micro, tmp_path, model):
    write_original(micro, tmp_path / "original")
    with pytest.raises(ValueError, match="original layout; choose another"):
        model.save_pretrained(tmp_path / "original")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file: not a directory"):
        model.save_pretrained(tmp_path / "file")
