"""The splice: audio frames take the places of the <sound> ids."""

import copy

import pytest
import torch

from af3 import splice

SOUND = 644


def audio(*mel_frames):
    """Random features of windows with so many real mel frames, as arguments of the model."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(len(mel_frames), 128, 3000, generator=generator)
    mask = torch.arange(3000) < torch.tensor(mel_frames)[:, None]
    return {"input_features": features, "feature_attention_mask": mask.long()}


def test_each_sound_takes_the_next_audio_frame_row_after_row_and_all_else_stays():
    x = torch.tensor([[[5.0], [6.0], [7.0], [8.0]], [[5.0], [6.0], [7.0], [8.0]]])
    is_sound = torch.tensor([[False, True, True, False], [True, False, False, True]])
    frames = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    assert splice(x, is_sound, frames)[..., 0].tolist() == [[5, 1, 2, 8], [3, 6, 7, 4]]


def test_audio_frames_are_cast_to_the_dtype_of_the_embeddings():
    x = torch.zeros(1, 2, 3, dtype=torch.bfloat16)
    assert splice(x, torch.tensor([[True, False]]), torch.ones(1, 3)).dtype == torch.bfloat16


@pytest.mark.differs("transformers refuses them with another sentence")
def test_as_many_sounds_as_audio_frames_are_expected():
    for tokens, frames in [(2, 1), (1, 2), (0, 1)]:
        is_sound = torch.arange(3)[None] < tokens
        message = f"^Audio tokens and features mismatch: tokens={tokens}, frames={frames}. "
        with pytest.raises(ValueError, match=message):
            splice(torch.zeros(1, 3, 1), is_sound, torch.zeros(frames, 1))


@pytest.mark.differs("transformers embeds <sound> like any id where there is no audio")
def test_sound_ids_in_a_prompt_without_audio_are_refused(model):
    with pytest.raises(ValueError, match="tokens=2, frames=0"):
        model(torch.tensor([[3, SOUND, SOUND, 5]]))


def test_the_configuration_says_which_id_is_replaced_whatever_its_own_embedding(model):
    other_model = copy.deepcopy(model)
    other_model.config.audio_token_id = 7
    logits = other_model(torch.tensor([[3, 7, 5]]), **audio(4)).logits
    assert torch.equal(logits, model(torch.tensor([[3, SOUND, 5]]), **audio(4)).logits)


def test_the_windows_of_a_batch_belong_to_its_rows_in_order(model):
    ids = torch.tensor([[3, SOUND, 5, SOUND, SOUND], [SOUND, 7, 8, 9, 10]])
    windows = audio(4, 8, 5)  # 1 and 2 audio frames for the first row, 1 for the second
    together = model(ids, **windows).logits
    first = model(ids[:1], **{name: tensor[:2] for name, tensor in windows.items()}).logits
    second = model(ids[1:], **{name: tensor[2:] for name, tensor in windows.items()}).logits
    assert (together - torch.cat([first, second])).abs().max() < 1e-4
