"""What Music Flamingo and Audio Flamingo Next add: borders, rotary time, and other limits.

The model of these tests has the weights of `model`, with two rows more in its vocabulary.
"""

import json
import math
import shutil

import numpy as np
import pytest
import torch

from af3 import AudioFlamingo3EncoderConfig
from extras import music_flamingo
from extras.music_flamingo import RotaryTimeConfig, RotaryTimeEmbedding
from processor import MusicFlamingoProcessor

SOUND, BEGIN, END = 644, 647, 648  # <sound>, <|sound_bos|>, <|sound_eos|>


def audio_ids(batch, row=0):
    """The ids of a row from its first border to its last."""
    ids = batch["input_ids"][row].tolist()
    return ids[ids.index(BEGIN) : len(ids) - ids[::-1].index(END)]


def user(recording):
    return {"role": "user", "content": [{"type": "audio", "audio": recording}]}


def windows(*mel_frames):
    """Random features of windows, and their mask."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(len(mel_frames), 128, 3000, generator=generator)
    mask = torch.arange(3000) < torch.tensor(mel_frames)[:, None]
    return features, mask.long()


def plain_angle(window, frame, j, num_angles):
    """The angle of channels 2j and 2j + 1 of a frame of a window, in float64."""
    seconds = window * 750 * 0.04 + frame * 0.04
    half = num_angles // 2
    if j < half:
        place = window / 1200 * 1200 ** (-2 * j / num_angles)
    else:
        place = frame / 1200 * 2 * math.pi * 1200 ** (-2 * (j - half) / num_angles)
    return -seconds * 2 * math.pi * place


def plain_rotation(x, window, frame):
    """An audio frame (H,), with the first 0.4 H of its channels rotated in neighboring pairs."""
    num_angles = int(0.2 * len(x))
    turned = x.clone()
    for j in range(num_angles):
        angle = plain_angle(window, frame, j, num_angles)
        first, second = x[2 * j], x[2 * j + 1]
        turned[2 * j] = first * math.cos(angle) - second * math.sin(angle)
        turned[2 * j + 1] = second * math.cos(angle) + first * math.sin(angle)
    return turned


# ---- The prompt ----


def test_a_recording_stands_between_its_two_borders_however_many_windows_it_has(
    music_processor, sound
):
    batch = music_processor("Hi", sound(480_321))

    assert audio_ids(batch) == [BEGIN, *[SOUND] * 751, END]


@pytest.mark.differs("transformers takes one recording for each conversation")
def test_each_recording_of_a_conversation_has_its_own_borders(music_processor, sound):
    turns = [user(sound(321)), {"role": "assistant", "content": "Hi"}, user(sound(640))]

    batch = music_processor.apply_chat_template(turns, tokenize=True, return_dict=True)

    ids = audio_ids(batch)
    assert ids[:3] == [BEGIN, SOUND, END]
    assert ids[-3:] == [BEGIN, SOUND, END]


def test_the_borders_are_those_that_processor_config_json_names_if_it_names_them(
    music_checkpoint, tmp_path, sound
):
    folder = shutil.copytree(music_checkpoint, tmp_path / "checkpoint")
    fields = json.loads((folder / "processor_config.json").read_text())
    begin, end = fields.pop("audio_bos_token"), fields.pop("audio_eos_token")
    for names, ids in [
        ({}, [BEGIN, END]),
        ({"audio_bos_token": end, "audio_eos_token": begin}, [END, BEGIN]),
    ]:
        (folder / "processor_config.json").write_text(json.dumps(fields | names))
        batch = MusicFlamingoProcessor.from_pretrained(folder)("Hi", sound(321))
        assert batch["input_ids"][0, -10:-7].tolist() == [ids[0], SOUND, ids[1]]


def test_labels_are_minus_100_on_the_borders_too(music_processor, sound):
    batch = music_processor("Hi", sound(321), output_labels=True)

    start = batch["input_ids"][0].tolist().index(BEGIN)
    assert batch["labels"][0, start - 1 : start + 4].tolist() == [198, -100, -100, -100, 39]


def test_the_default_system_message_is_their_own(music_processor):
    text = music_processor.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)

    assert text.startswith("<|im_start|>system\nYou listen to music.<|im_end|>\n")


def test_1200_s_are_heard_if_processor_config_json_does_not_say_otherwise(music_processor):
    recording = np.zeros(19_200_001, dtype=np.float32)

    batch = music_processor("Hi", recording)

    assert len(batch["input_features"]) == 40
    assert (batch["input_ids"] == SOUND).sum() == 30_000


def test_strip_prefix_strips_nothing_because_they_write_no_introduction(music_processor):
    text = "The transcription of the audio is 'a'."
    ids = music_processor.tokenizer.encode(text)

    assert music_processor.decode(ids, strip_prefix=True) == text


@pytest.mark.differs("transformers counts the <sound> ids of the prompt in the model")
def test_the_batch_says_which_window_of_its_recording_each_window_is(music_processor, sound):
    batch = music_processor(["Hi", "Hi"], [sound(960_321), sound(480_321)])

    assert batch["window_index"].tolist() == [0, 1, 2, 0, 1]


# ---- Rotary time ----


def test_without_audio_they_compute_what_audio_flamingo_3_does(model, music_model):
    prompt = torch.tensor([[619, 562, 198, 39, 72]])

    logits = music_model(prompt).logits[..., :647]  # without the borders

    assert torch.allclose(logits, model(prompt).logits, atol=1e-5)


def test_period_and_fraction_and_frame_step_are_at_the_top_of_config_json():
    fields = {
        "model_type": "musicflamingo",
        "rope_theta": 900.0,
        "partial_rotary_factor": 0.1,
        "audio_frame_step": 0.02,
        "head_dim": 8,  # is there, and means nothing
    }

    section = music_flamingo.rotary_time_section(fields)

    config = music_flamingo.read_rotary_time_config(section)
    assert config == RotaryTimeConfig(900.0, 0.1, 0.02)
    assert music_flamingo.read_rotary_time_config({}) is None
    assert RotaryTimeConfig() == RotaryTimeConfig(1200.0, 0.2, 0.01)


def test_the_first_frame_of_a_recording_is_not_rotated(model, music_model):
    features, mask = windows(100)

    rotated = music_model.get_audio_features(features, mask, torch.tensor([0]))
    plain = model.get_audio_features(features, mask)

    assert torch.allclose(rotated[0], plain[0], atol=1e-5)
    assert (rotated[24] - plain[24]).abs().max() > 0.01


@torch.no_grad()
def test_between_encoder_and_projector_a_frame_is_rotated_by_its_time_and_place(model, music_model):
    features, mask = windows(3000, 3000, 100)
    frames = model.audio_tower(features, mask)

    rotated = music_model.get_audio_features(features, mask, torch.tensor([0, 1, 2]))

    for window, frame in [(0, 1), (0, 749), (1, 0), (1, 749), (2, 0), (2, 24)]:
        turned = plain_rotation(frames[window, frame], window, frame)
        projected = model.multi_modal_projector(turned)
        assert torch.allclose(rotated[750 * window + frame], projected, atol=1e-3)


def test_at_full_size_the_angles_are_those_of_the_official_code():
    embedding = RotaryTimeEmbedding(RotaryTimeConfig(), AudioFlamingo3EncoderConfig())

    angles = embedding.angles(torch.tensor([0, 1, 2]), 750)

    assert angles.shape == (3, 750, 256)
    assert angles[1, 10, 0].cos().item() == pytest.approx(0.98735851, abs=1e-6)
    assert angles[2, 749, 128].cos().item() == pytest.approx(0.31526735, abs=1e-6)


def test_the_angles_are_computed_in_float32_in_this_order():
    embedding = RotaryTimeEmbedding(RotaryTimeConfig(), AudioFlamingo3EncoderConfig())
    frames = torch.arange(750.0)
    seconds = torch.tensor(2) * 750 * 0.04 + frames * 0.04
    frequencies = 1 / 1200 ** (torch.arange(0, 256, 2) / 256)
    by_window = (torch.tensor(2) / 1200 * frequencies).expand(750, 128)
    by_frame = (frames[:, None] / 1200 * (2 * math.pi)) * frequencies

    angles = embedding.angles(torch.tensor([2]), 750)[0]

    expected = torch.cat([by_window, by_frame], dim=1) * (-seconds * 2 * math.pi)[:, None]
    assert torch.equal(angles, expected)


def test_a_bfloat16_frame_is_rotated_by_exact_angles_and_rounded_once():
    embedding = RotaryTimeEmbedding(RotaryTimeConfig(), AudioFlamingo3EncoderConfig())
    x = torch.randn(1, 20, 1280, generator=torch.Generator().manual_seed(0)).bfloat16()

    rotated = embedding(x, torch.tensor([3]))

    expected = plain_rotation(x[0, 19].double(), 3, 19).bfloat16()
    assert (rotated[0, 19] == expected).float().mean() > 0.99
    assert rotated.dtype == torch.bfloat16


@torch.no_grad()
def test_the_ninth_window_of_a_recording_is_rotated_like_any_other(model, music_model):
    features, mask = windows(*[4] * 9)
    frames = model.audio_tower(features, mask)

    rotated = music_model.get_audio_features(features, mask, torch.arange(9))

    projected = model.multi_modal_projector(plain_rotation(frames[8, 0], 8, 0))
    assert torch.allclose(rotated[8], projected, atol=1e-3)


@pytest.mark.differs("transformers counts a window without audio frames to the next recording")
def test_a_last_window_too_short_for_an_audio_frame_does_not_move_the_next_recording(
    music_model, music_processor, sound
):
    batch = music_processor(["Hi", "Hi"], [sound(480_001), sound(16_080)])
    alone = music_processor("Hi", sound(16_080))

    logits = music_model(**batch).logits[1, -10:]

    assert torch.allclose(logits, music_model(**alone).logits[0, -10:], atol=1e-4)


@pytest.mark.differs("transformers counts the <sound> ids of the prompt")
def test_the_index_of_every_window_is_needed(music_model):
    features, mask = windows(100, 100)

    for places in (None, torch.tensor([0]), torch.tensor([0, 1, 2])):
        with pytest.raises(ValueError, match="window_index, the place of each window"):
            music_model.get_audio_features(features, mask, places)
