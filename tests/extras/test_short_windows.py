"""Windows of different lengths: encoded apart, with the frames of the plain encoder."""

import torch

from af3 import AudioFlamingo3Encoder, AudioFlamingo3ForConditionalGeneration
from extras.short_windows import encode_short_windows_apart
from signals import sound


def test_a_short_window_is_not_padded_to_a_long_one(micro, model, processor, monkeypatch):
    changed = AudioFlamingo3ForConditionalGeneration.from_pretrained(micro, "cpu")
    encode_short_windows_apart(changed)
    encode = AudioFlamingo3Encoder.forward
    sizes = []

    def noting_forward(self, features, mask):
        sizes.append((len(mask), int(mask.sum(-1).max())))
        return encode(self, features, mask)

    lengths = [16000, 16100, 1_000_000, 9000]  # the third one is 30 s, 30 s and 2.5 s
    batch = processor(["?"] * 4, [sound(length, seed=length) for length in lengths])
    audio = batch["input_features"], batch["feature_attention_mask"]
    expected = model.get_audio_features(*audio)
    monkeypatch.setattr(AudioFlamingo3Encoder, "forward", noting_forward)
    frames = changed.get_audio_features(*audio)
    assert sizes == [(2, 101), (2, 3000), (1, 250), (1, 57)]
    assert frames.shape == expected.shape
    assert (frames - expected).abs().max() < 1e-5


def test_windows_of_one_length_give_the_same_bits(micro, model, processor):
    changed = AudioFlamingo3ForConditionalGeneration.from_pretrained(micro, "cpu")
    encode_short_windows_apart(changed)
    batch = processor("?", sound(960_000))
    audio = batch["input_features"], batch["feature_attention_mask"]
    assert torch.equal(changed.get_audio_features(*audio), model.get_audio_features(*audio))
