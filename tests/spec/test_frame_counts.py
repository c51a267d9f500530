"""How many <sound> ids a recording takes. Every number here can be checked by hand.

A window is 30 s, 480,000 samples. A mel frame begins every 160 samples, and the last one may be
partly padding. Conv2 makes one conv frame of two mel frames, and of a single one at the end; the
pool makes one audio frame of two conv frames, and none of a single one at the end. The prompt has
one <sound> id for each audio frame.
"""

import numpy as np
import pytest

from af3 import frame_counts

TABLE = [  # samples, then for each window: mel frames, conv frames, audio frames = <sound> ids
    (321, [3], [2], [1]),
    (16_080, [101], [51], [25]),
    (80_000, [500], [250], [125]),
    (480_000, [3000], [1500], [750]),
    (480_001, [3000, 1], [1500, 1], [750, 0]),
    (640_000, [3000, 1000], [1500, 500], [750, 250]),
]
SOUND = 644  # the id of <sound>


def test_a_recording_is_cut_into_windows_of_480000_samples(processor, sound):
    for num_samples, mel_frames, _, _ in TABLE:
        batch = processor("Hi", sound(num_samples))

        assert len(batch["input_features"]) == len(mel_frames)


def test_a_mel_frame_begins_every_160_samples_of_a_window(processor, sound):
    for num_samples, mel_frames, _, _ in TABLE:
        mask = processor("Hi", sound(num_samples))["feature_attention_mask"]

        assert mask.sum(1).tolist() == mel_frames


def test_conv2_halves_the_mel_frames_and_rounds_up():
    for _, mel_frames, conv_frames, _ in TABLE:
        assert [frame_counts(number)[0] for number in mel_frames] == conv_frames


def test_the_pool_halves_the_conv_frames_and_rounds_down():
    for _, mel_frames, _, audio_frames in TABLE:
        assert [frame_counts(number)[1] for number in mel_frames] == audio_frames


def test_the_prompt_has_one_sound_id_for_each_audio_frame(processor, sound):
    for num_samples, _, _, audio_frames in TABLE:
        ids = processor("Hi", sound(num_samples))["input_ids"]

        assert (ids == SOUND).sum() == sum(audio_frames)


def test_the_model_makes_as_many_audio_frames_as_the_prompt_has_sound_ids(model, processor, sound):
    for num_samples, _, _, audio_frames in TABLE:
        batch = processor("Hi", sound(num_samples))
        audio = (batch["input_features"], batch["feature_attention_mask"])

        assert len(model.get_audio_features(*audio)) == sum(audio_frames)


@pytest.mark.differs("transformers makes a prompt without <sound>, and the answer ignores it")
def test_a_recording_too_short_for_one_audio_frame_is_refused(processor, sound):
    with pytest.raises(ValueError, match="audio of 320 samples; at least 321"):
        processor("Hi", sound(320))


def test_only_the_first_600_s_of_a_longer_recording_are_heard(processor):
    recording = np.zeros(9_600_001, dtype=np.float32)
    recording[0] = 1

    batch = processor("Hi", recording)

    assert len(batch["input_features"]) == 20
    assert batch["input_features"][0].max() > batch["input_features"][1].max()  # it has the click
    assert (batch["input_ids"] == SOUND).sum() == 15_000
