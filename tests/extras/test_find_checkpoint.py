"""Finding a checkpoint: directories, the hub's cache, and what an error says about its files.

The commands in errors and texts are run by the `hf` program itself, if it is installed.
"""

import json
import os
import re
import shutil

import pytest
import torch

from af3 import AudioFlamingo3ForConditionalGeneration
from checkpoints import write_original, write_sharded
from hub import (
    NEEDED,
    REPOSITORIES,
    commands_in_texts,
    hub_version,
    matching_files,
    run_with_hub,
    select_files,
)
from places import DATA
from plumbing.download import FILES, download_command, hub_cache
from plumbing.find_checkpoint import find_checkpoint
from processor import AudioFlamingo3Processor

from_pretrained = AudioFlamingo3ForConditionalGeneration.from_pretrained

NAME = "nvidia/audio-flamingo-3-hf"
VARIABLES = ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"]
COMPLETE = download_command(NAME)


@pytest.fixture
def hub():
    """Skips a test where there is no huggingface_hub."""
    if not hub_version():
        pytest.skip("huggingface_hub is not installed")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch, tmp_path):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def refusal(folder) -> str:
    """The error of loading a model and its processor; it must be one line."""
    with pytest.raises((ValueError, OSError)) as caught:
        from_pretrained(folder)
        AudioFlamingo3Processor.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- Directories ----


def test_a_directory_that_is_not_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json inside; a checkpoint is expected"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["tinyy", "./tiny/x", "/tinyy", ""])
def test_a_path_that_is_not_a_directory_is_refused_without_a_download_command(name):
    with pytest.raises(FileNotFoundError, match="no such directory; a checkpoint is") as error:
        find_checkpoint(name)
    assert "hf download" not in str(error.value)


def test_a_tilde_is_the_home_directory(micro, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(micro, tmp_path / "af3")
    assert find_checkpoint("~/af3") == tmp_path / "af3"
    assert from_pretrained("~/af3", "cpu")
    assert missing("~/af4") == "'~/af4': no such directory; a checkpoint is expected."


def test_a_directory_named_with_a_tilde_is_itself(micro, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(micro, tmp_path / "~" / "af3")
    assert find_checkpoint("~/af3").samefile(tmp_path / "~" / "af3")


# ---- The hub's cache ----


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def in_cache(micro, cache):
    """A model in a cache like that of `hf`: its snapshot consists of symbolic links."""
    model = cache / "models--nvidia--audio-flamingo-3-hf"
    snapshot = model / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    for file in micro.iterdir():
        shutil.copy(file, model / "blobs" / file.name)
        (snapshot / file.name).symlink_to(model / "blobs" / file.name)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("abc")
    return model


@pytest.mark.parametrize(
    "variable, value",
    [
        ("HF_HUB_CACHE", "TMP/hub"),
        ("HUGGINGFACE_HUB_CACHE", "TMP/hub"),
        ("HF_HOME", "TMP"),
        ("XDG_CACHE_HOME", "TMP/xdg"),
        ("HF_HUB_CACHE", "$TEST_FOLDER/hub"),
        ("HUGGINGFACE_HUB_CACHE", "~/../hub"),
        ("HF_HOME", "${TEST_FOLDER}"),
        ("XDG_CACHE_HOME", "~/../xdg"),
    ],
)
def test_a_hub_name_is_found_in_the_local_cache(in_cache, monkeypatch, tmp_path, variable, value):
    (tmp_path / "home").mkdir()
    (tmp_path / "xdg").mkdir()
    (tmp_path / "xdg" / "huggingface").symlink_to(tmp_path)
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("TEST_FOLDER", str(tmp_path))
    monkeypatch.setenv(variable, value.replace("TMP", str(tmp_path)))
    assert find_checkpoint(NAME).samefile(in_cache / "snapshots" / "abc")


def test_a_model_in_the_cache_is_loaded_through_its_links(in_cache):
    assert find_checkpoint(NAME) == in_cache / "snapshots" / "abc"
    assert from_pretrained(NAME, "cpu").dtype == torch.float32


def test_without_variables_the_cache_is_in_the_home_directory(tmp_path):
    assert hub_cache() == tmp_path / "home" / ".cache" / "huggingface" / "hub"


VALUES = [None, "", "/a", "~/b", "$TEST_FOLDER/c", "d/${NOT_SET}"]
READ_CACHE = """
import importlib, json, os, sys
from huggingface_hub import constants
folders = []
for variables in json.load(sys.stdin):
    os.environ.update({name: value for name, value in variables.items() if value is not None})
    folders.append(importlib.reload(constants).HF_HUB_CACHE)
    for name in variables:
        os.environ.pop(name, None)
print(json.dumps(folders))
"""


def test_the_cache_is_where_huggingface_hub_has_it_for_all_variables(hub, monkeypatch):
    combinations = [{}]
    for name in VARIABLES:
        combinations = [{**some, name: value} for some in combinations for value in VALUES]
    home = {"HOME": "/home/me", "TEST_FOLDER": "/folder"}
    theirs = json.loads(run_with_hub(READ_CACHE, json.dumps(combinations), **home))
    ours = []
    for variables in combinations:
        with monkeypatch.context() as patch:
            for name, value in (home | variables).items():
                if value is not None:
                    patch.setenv(name, value)
            ours.append(hub_cache())
    assert [str(path) for path in ours] == [os.path.join(path) or "." for path in theirs]


# ---- Models that are not in the cache ----


def missing(name: str) -> str:
    with pytest.raises(FileNotFoundError) as error:
        find_checkpoint(name)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_model_is_refused_with_the_command_that_downloads_it(cache, name):
    message = missing(name)
    assert str(cache) in message
    assert message.endswith(f" To download it: {download_command(name)}")


@pytest.mark.parametrize(
    "name, meant",
    [
        ("nvidia/audio-flamingo3-hf", NAME),
        ("nvidia/audio-flamingo-3-fh", NAME),
        ("NVIDIA/Audio-Flamingo-3-HF", NAME),
        ("nvidia/audio-flamingo3", "nvidia/audio-flamingo-3"),
        ("nvidia/musicflamingo-hf", "nvidia/music-flamingo-hf"),
        ("nvidia/audio-flamingo-next", "nvidia/audio-flamingo-next-hf"),
    ],
)
def test_a_misspelled_name_is_refused_with_the_one_that_is_meant(cache, name, meant):
    message = missing(name)
    assert f"Perhaps {meant} is meant." in message
    assert message.endswith(download_command(meant))


def test_a_misspelled_name_of_a_model_in_the_cache_needs_no_download(in_cache):
    assert missing("nvidia/audioflamingo-3-hf").endswith(
        f"Perhaps {NAME} is meant, which is there."
    )


@pytest.mark.parametrize("name", ["audio-flamingo-3-hf", f"https://hub/{NAME}"])
def test_a_hub_name_without_its_owner_or_with_an_address_is_recognized(cache, name):
    assert missing(name).endswith(f"a checkpoint is expected. Perhaps {NAME} is meant.")


def test_a_snapshot_that_refs_does_not_name_is_shown(in_cache):
    snapshot = in_cache / "snapshots" / "abc"
    for content in (None, "def", "", "\udcff"):
        (in_cache / "refs" / "main").unlink(missing_ok=True)
        if content is not None:
            (in_cache / "refs" / "main").write_bytes(content.encode(errors="surrogateescape"))
        message = missing(NAME)
        assert message.endswith(f"instead of the name, use the path of one: {snapshot}")
        assert find_checkpoint(snapshot) == snapshot


def test_of_several_snapshots_the_newest_is_shown(in_cache):
    (in_cache / "refs" / "main").unlink()
    for age, name in enumerate(["old", "new", "older"]):
        (in_cache / "snapshots" / name).mkdir()
    os.utime(in_cache / "snapshots" / "new", (2e9, 2e9))
    assert missing(NAME).endswith(str(in_cache / "snapshots" / "new"))


def test_a_download_that_has_only_begun_is_completed(in_cache):
    shutil.rmtree(in_cache / "snapshots")
    (in_cache / "blobs" / "1f.incomplete").write_bytes(b"half")
    assert missing(NAME).endswith(f"is not complete. To complete it: {COMPLETE}")


def test_the_folder_of_a_model_in_the_cache_is_refused_with_what_to_use(in_cache):
    assert "use the model's name, or the path of one of" in missing(str(in_cache))


# ---- Checkpoints that are not complete ----

REQUIRED = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]


@pytest.mark.parametrize("name", REQUIRED)
@pytest.mark.parametrize("fault", ["absent", "a broken link"])
def test_an_incomplete_download_is_refused_with_the_command_that_completes_it(
    in_cache, name, fault
):
    snapshot = in_cache / "snapshots" / "abc"
    (snapshot / name if fault == "absent" else in_cache / "blobs" / name).unlink()
    for model in (NAME, snapshot):
        message = refusal(model)
        assert name in message
        assert message.endswith(f"the checkpoint is not complete. To complete it: {COMPLETE}")


@pytest.mark.parametrize(
    "lost", ["model-00002-of-00002.safetensors", "model.safetensors.index.json"]
)
def test_a_missing_shard_or_index_is_downloaded_by_the_same_command(in_cache, lost):
    snapshot = in_cache / "snapshots" / "abc"
    write_sharded(snapshot)
    (snapshot / lost).unlink()
    message = refusal(NAME)
    assert f"{lost}: no such file" in message
    assert message.endswith(COMPLETE)


def test_a_folder_of_the_original_layout_is_completed_with_its_own_patterns(micro, cache):
    snapshot = cache / "models--nvidia--audio-flamingo-3" / "snapshots" / "abc"
    write_original(micro, snapshot)
    for lost in ("sound_mm_projector/model.safetensors", "sound_tower/config.json", "llm"):
        shutil.move(snapshot / lost, cache)
        command = download_command("nvidia/audio-flamingo-3")
        assert refusal(snapshot).endswith(f" To complete it: {command} --revision abc")


def test_another_snapshot_or_cache_than_the_usual_is_completed_there(in_cache, monkeypatch):
    snapshot = in_cache / "snapshots" / "abc"
    (snapshot / "tokenizer.json").unlink()
    monkeypatch.setenv("HF_HUB_CACHE", "elsewhere")
    assert refusal(snapshot).endswith(f'{COMPLETE} --cache-dir "{in_cache.parent}"')
    (in_cache / "refs" / "main").write_text("def")
    assert refusal(snapshot).endswith(f'--revision abc --cache-dir "{in_cache.parent}"')


def test_a_link_to_a_snapshot_is_completed_in_the_cache(in_cache, tmp_path):
    (in_cache / "snapshots" / "abc" / "tokenizer.json").unlink()
    (tmp_path / "af3").symlink_to(in_cache / "snapshots" / "abc")
    assert refusal(tmp_path / "af3").endswith(COMPLETE)


@pytest.mark.parametrize("folder", ["audio-flamingo-3-hf", "think", "my model"])
@pytest.mark.parametrize("name", REQUIRED)
def test_a_directory_that_hf_has_filled_is_completed_there(micro, tmp_path, folder, name):
    folder = tmp_path / folder
    shutil.copytree(micro, folder)
    (folder / ".cache" / "huggingface" / "download").mkdir(parents=True)
    (folder / name).unlink()
    message = refusal(folder)
    assert message.endswith(f' --local-dir "{folder}"')
    if folder.name == "audio-flamingo-3-hf":
        assert f"To complete it: {COMPLETE}" in message
    else:
        assert "with its name on the hub for MODEL: hf download MODEL " in message


@pytest.mark.parametrize("name", REQUIRED[1:])
def test_no_command_is_given_for_a_directory_that_hf_has_not_filled(spoiled, tmp_path, name):
    (tmp_path / ".cache" / "huggingface" / "download").mkdir(parents=True)  # of the folder above
    (spoiled / name).unlink()
    assert refusal(spoiled).endswith("no such file; the checkpoint is not complete.")


def test_a_missing_think_adapter_is_downloaded_by_its_own_command(in_cache, run, clip):
    _, _, err = run(clip, "Hm?", "--think", model=NAME)
    assert err.endswith(f'To complete it: hf download {NAME} --include "think/*"\n')
    (in_cache / "snapshots" / "abc" / "think").mkdir()
    _, _, err = run(clip, "Hm?", "--think", model=NAME)
    assert err.endswith(f'To complete it: hf download {NAME} --include "think/*"\n')


def test_a_think_adapter_without_its_factors_is_completed(in_cache, run, clip):
    think = in_cache / "snapshots" / "abc" / "think"
    shutil.copytree(DATA / "think", think)
    (think / "adapter_model.safetensors").unlink()
    _, _, err = run(clip, "Hm?", "--think", model=NAME)
    assert "adapter_model.safetensors: no such file" in err
    assert err.endswith(f'To complete it: hf download {NAME} --include "think/*"\n')
    (think / "adapter_model.safetensors").write_bytes(b"half")
    _, _, err = run(clip, "Hm?", "--think", model=NAME)
    assert err.endswith(f"{NAME} think/adapter_model.safetensors --force-download\n")


# ---- Damaged files ----


@pytest.mark.parametrize("name", REQUIRED)
def test_a_damaged_file_is_downloaded_again_by_force(in_cache, name):
    path = in_cache / "blobs" / name
    path.write_bytes(path.read_bytes()[:-100])
    message = refusal(NAME)
    command = f"hf download {NAME} {name} --force-download"
    assert message.endswith(f" To download it again: {command}")


@pytest.mark.parametrize("name", REQUIRED)
def test_a_damaged_file_of_ones_own_is_saved_or_copied_again(spoiled, name):
    (spoiled / name).write_bytes((spoiled / name).read_bytes()[:-100])
    assert refusal(spoiled).endswith(" Save or copy it again.")


@pytest.mark.parametrize("name", REQUIRED)
def test_a_placeholder_of_git_lfs_is_replaced_by_git(spoiled, name):
    (spoiled / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1f\n")
    assert refusal(spoiled).endswith(f'To get it: git -C "{spoiled}" lfs pull')


# ---- The commands, run by `hf` ----


def test_the_texts_are_searched_for_commands():
    files = {file for file, _ in commands_in_texts()}
    assert files >= {"README.md", "docs/benchmarks.md", "tools/official.py"}


def test_every_command_in_the_texts_selects_the_files_that_its_patterns_match(hub):
    commands = [command for _, command in commands_in_texts()]
    for command, selected in zip(commands, select_files(commands)):
        assert selected == matching_files(command) != set(), command


def test_commands_in_the_texts_that_download_weights_select_one_copy_of_them(hub):
    commands = [command for _, command in commands_in_texts() if "safetensors" in command]
    assert len(commands) >= 2
    for command, selected in zip(commands, select_files(commands)):
        assert selected >= set(NEEDED), command
        assert "model.safetensors" not in selected, command


def test_the_commands_in_errors_select_whole_models(hub):
    names = [NAME, "nvidia/audio-flamingo-3", "nvidia/music-flamingo-hf"]
    official, original, other = select_files([download_command(name) for name in names])
    assert official >= set(NEEDED)
    assert "model.safetensors" not in official
    outside = {".gitattributes", "README.md"}
    for name in REPOSITORIES["nvidia/audio-flamingo-3"]:
        assert (name in original) == (name not in outside and not name.startswith("stage35"))
    assert other >= {*NEEDED, "model.safetensors"}


def command_in(message: str) -> str:
    return re.search(r"hf download .*", message)[0]


def test_the_commands_for_damaged_and_missing_files_are_understood(hub, in_cache, monkeypatch):
    snapshot = in_cache / "snapshots" / "abc"
    monkeypatch.setenv("HF_HUB_CACHE", "elsewhere")
    (in_cache / "refs" / "main").unlink()
    (in_cache / "blobs" / "tokenizer.json").write_text("{")
    damaged = command_in(refusal(snapshot))
    (in_cache / "blobs" / "tokenizer.json").unlink()
    absent = command_in(refusal(snapshot))
    selected = select_files([damaged, absent, f'hf download {NAME} --include "think/*"'])
    assert selected[0] == {"tokenizer.json"}
    assert selected[1] >= set(NEEDED)
    assert {name.split("/")[0] for name in selected[2]} == {"think"}
