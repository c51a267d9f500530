"""Music Flamingo and Audio Flamingo Next: their files, and their use on the command line.

Their rules are in tests/spec/, their numbers in tests/parity/.
"""

import shutil

import pytest
import torch

from af3 import (
    AudioFlamingo3Config,
    AudioFlamingo3ForConditionalGeneration,
)
from checkpoints import change_json
from extras.chat import Conversation
from extras.music_flamingo import RotaryTimeConfig
from load_weights import read_config
from plumbing.json_file import from_known_keys
from plumbing.tokenizer_files import read_token_ids
from processor import AudioFlamingo3Processor
from signals import sound, write_wav

from_pretrained = AudioFlamingo3ForConditionalGeneration.from_pretrained


@pytest.fixture(scope="module")
def music_model(families):
    return from_pretrained(families["music"], device_map="cpu")


@pytest.fixture(scope="module")
def music_processor(families):
    return AudioFlamingo3Processor.from_pretrained(families["music"])


@pytest.fixture
def changeable(families, tmp_path):
    """A copy of a checkpoint that a test may modify."""
    return shutil.copytree(families["music"], tmp_path / "checkpoint")


def new_ids(model, batch, **options):
    return model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]


# ---- Rotary time ----


def test_audio_flamingo_3_has_no_rotary_time(model, processor):
    assert model.rotary_time is None
    assert "window_index" not in processor("Hi", sound(4000))


def test_the_rotary_time_at_the_top_of_config_json_is_not_the_decoders(music_flamingo):
    config = read_config(music_flamingo, read_token_ids(music_flamingo))
    config = from_known_keys(AudioFlamingo3Config, config)
    assert config.rotary_time_config == RotaryTimeConfig(1200, 0.2, 0.01)
    expected = {"music": (1e6, 4096), "next": (15.3e6, 131072)}[music_flamingo.name]
    text = config.text_config
    assert (text.rope_theta, text.max_position_embeddings) == expected
    assert text.head_dim == 12


def test_several_recordings_in_a_conversation_are_those_of_one_prefill(
    music_model, music_processor
):
    talk = Conversation(music_processor, music_model)
    options = {"max_new_tokens": 5, "eos_token_id": []}
    first_question = talk.question("One?", [sound(9000), sound(500000)])
    first = torch.stack(list(talk.answer(first_question, **options)), dim=1)
    second_question = talk.question("Two?", [sound(700000)])
    second = torch.stack(list(talk.answer(second_question, **options)), dim=1)

    ids = torch.cat([first_question["input_ids"], first[:, :-1], second_question["input_ids"]], 1)
    whole = {"input_ids": ids}
    for name in ("input_features", "feature_attention_mask", "window_index"):
        whole[name] = torch.cat([first_question[name], second_question[name]])
    assert whole["window_index"].tolist() == [0, 0, 1, 0, 1]
    assert torch.equal(new_ids(music_model, whole, **options), second)


# ---- Words ----


def test_windows_placed_by_hand_have_borders_around_them_all(music_processor):
    begin_id, end_id = music_processor.borders.ids
    ids = music_processor("a<sound>b<sound>c", sound(490000))["input_ids"][0].tolist()
    sound_id = music_processor.audio_token_id
    assert ids[ids.index(begin_id) + 1] == sound_id
    assert ids[ids.index(end_id) - 1] == sound_id
    assert (ids.count(begin_id), ids.count(end_id)) == (1, 1)
    assert ids[ids.index(begin_id) + 751] not in (sound_id, end_id)


def test_borders_that_a_user_spells_out_are_text(music_processor):
    begin_id, end_id = music_processor.borders.ids
    ids = music_processor("<|sound_bos|><|sound_eos|>")["input_ids"]
    assert not torch.isin(ids, torch.tensor([begin_id, end_id])).any()


def test_the_longest_audio_is_1200_s_unless_the_checkpoint_says_otherwise(changeable):
    processor = AudioFlamingo3Processor.from_pretrained(changeable)
    assert processor.max_samples == 1200 * 16000
    change_json(changeable / "processor_config.json", max_audio_len=1800)
    processor = AudioFlamingo3Processor.from_pretrained(changeable)
    assert processor.max_samples == 1800 * 16000


def test_a_tokenizer_without_the_borders_is_refused(changeable):
    change_json(changeable / "processor_config.json", audio_bos_token="<|begin|>")
    with pytest.raises(ValueError, match=r"'<\|begin\|>' is not among the added tokens"):
        AudioFlamingo3Processor.from_pretrained(changeable)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"rope_type": "linear"}, "rope_type is 'linear'; only 'default'"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"partial_rotary_factor": 0.7}, "partial_rotary_factor is 0.7"),
        ({"audio_frame_step": "x"}, "audio_frame_step is 'x'"),
    ],
)
def test_a_field_of_another_rotary_time_is_reported(changeable, fields, message):
    path = changeable / "config.json"
    change_json(path, rope_parameters={"rope_type": "default", "rope_theta": 1200.0} | fields)
    with pytest.raises(ValueError, match=message):
        from_pretrained(changeable, "cpu")


# ---- Ways of use ----


@pytest.mark.parametrize(
    "flags", [[], ["--explain"], ["--timestamps"], ["--int8"], ["--batch-size", "2"]]
)
def test_the_command_line_supports_it(run, families, tmp_path, flags):
    path = write_wav(tmp_path / "a.wav", sound(490000))
    arguments = [path, "What?", "--max-new-tokens", "3", *flags]
    status, output, errors = run(*arguments, model=families["music"])
    assert (status, "error" in errors) == (0, False)
    assert output.strip()


def test_explain_shows_the_rotary_time_as_a_stage(run, families, clip):
    options = ["--explain", "--max-new-tokens", 2]
    _, output, _ = run(clip, "What?", *options, model=families["next"])
    stages = [line.split("  ")[0] for line in output.split("\n")[:16]]
    assert stages.index("pool, LayerNorm") < stages.index("rotary time") < stages.index("projector")


def test_a_saved_model_is_read_again_with_its_rotary_time(music_model, music_processor, tmp_path):
    folder = tmp_path / "saved"
    source_config = music_model.source_config
    music_model.source_config = {}  # as in a model that was not loaded from the hub layout
    music_model.save_pretrained(folder)
    music_model.source_config = source_config
    music_processor.save_pretrained(folder)
    saved = from_pretrained(folder, "cpu")
    processor = AudioFlamingo3Processor.from_pretrained(folder)
    assert saved.config == music_model.config
    batch = processor("Hi", sound(500000))
    assert torch.equal(saved(**batch).logits, music_model(**batch).logits)
