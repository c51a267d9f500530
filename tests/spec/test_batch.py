"""Prompts and recordings become the tensors of one batch."""

import numpy as np
import pytest
import torch

PAD = 646  # [PAD]
SOUND = 644


def chat(question, recording, answer):
    content = [{"type": "text", "text": question}, {"type": "audio", "audio": recording}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="module")
def batch(processor, sound):
    """Rows of 2 windows and of 1; the second row is shorter."""
    return processor(["Hi", "Hi"], [sound(480_321), sound(16_080)])


@pytest.mark.differs("in transformers, the feature mask is int32")
def test_ids_and_masks_are_int64_and_features_are_float32(batch):
    dtypes = {name: tensor.dtype for name, tensor in batch.items()}

    assert dtypes.pop("input_features") == torch.float32
    assert len(dtypes) == 3
    assert set(dtypes.values()) == {torch.int64}


def test_features_are_the_windows_of_all_rows_in_order(batch, processor, sound):
    features = batch["input_features"]
    first = processor("Hi", sound(480_321))["input_features"]
    second = processor("Hi", sound(16_080))["input_features"]

    assert features.shape == (3, 128, 3000)
    assert torch.equal(features, torch.cat([first, second]))


def test_the_feature_mask_is_1_on_real_mel_frames_which_come_first(batch):
    mask = batch["feature_attention_mask"]

    assert mask.shape == (3, 3000)
    assert mask[2].tolist() == [1] * 101 + [0] * 2899


def test_the_shorter_row_is_padded_on_the_left_with_the_pad_token(batch, processor, sound):
    alone = processor("Hi", sound(16_080))["input_ids"][0].tolist()
    padding = batch["input_ids"].shape[1] - len(alone)

    assert padding == 751 - 25
    assert batch["input_ids"][1].tolist() == [PAD] * padding + alone
    assert batch["attention_mask"][1].tolist() == [0] * padding + [1] * len(alone)


def test_padding_side_right_puts_it_after_the_row(processor, sound):
    rows = processor(["Hi", "Hi"], [sound(480_321), sound(16_080)], padding_side="right")

    assert rows["input_ids"][1, -726:].tolist() == [PAD] * 726
    assert rows["attention_mask"][1].tolist() == [1] * 46 + [0] * 726


def test_a_prompt_without_audio_has_only_ids_and_their_mask(processor):
    assert set(processor("Hi")) == {"input_ids", "attention_mask"}


def test_labels_are_the_ids_but_minus_100_on_audio_and_padding(processor, sound):
    rows = processor(["Hi", "Hello"], [sound(480_321), sound(16_080)], output_labels=True)

    ignored = (rows["input_ids"] == SOUND) | (rows["attention_mask"] == 0)
    assert (rows["labels"][ignored] == -100).all()
    assert torch.equal(rows["labels"][~ignored], rows["input_ids"][~ignored])


@pytest.mark.differs("transformers has no such labels")
def test_answer_labels_are_only_what_the_assistant_says_and_its_end(processor, sound):
    turns = chat("Hi", sound(321), "Rain.")

    rows = processor.apply_chat_template(turns, output_labels="answer")

    kept = rows["labels"][rows["labels"] != -100]
    assert processor.decode(kept) == "Rain.<|im_end|>"
    assert rows["labels"][0, -1] == -100  # the newline after it


def test_a_batch_moved_to_a_dtype_keeps_its_integers(batch):
    half = batch.to("cpu", torch.bfloat16)

    assert half["input_features"].dtype == torch.bfloat16
    for name in ("input_ids", "attention_mask", "feature_attention_mask"):
        assert torch.equal(half[name], batch[name])
        assert half[name].dtype == batch[name].dtype


@pytest.mark.differs("in transformers, it has only that name")
def test_the_feature_mask_also_has_the_name_that_transformers_uses(batch):
    assert torch.equal(batch["input_features_mask"], batch["feature_attention_mask"])


def test_conversations_are_rows_of_a_batch(processor, sound):
    turns = [chat("Hi", sound(321), "Rain."), chat("Hi", sound(16_080), "Rain.")]

    rows = processor.apply_chat_template(turns, tokenize=True, return_dict=True)

    assert (rows["input_ids"] == SOUND).sum(1).tolist() == [1, 25]
    assert rows["feature_attention_mask"].sum(1).tolist() == [3, 101]


def test_without_return_dict_a_conversation_gives_its_ids(processor):
    turns = [{"role": "user", "content": "Hi"}]

    ids = processor.apply_chat_template(turns, tokenize=True, return_dict=False)

    rows = processor.apply_chat_template(turns, tokenize=True, return_dict=True)
    assert torch.equal(torch.as_tensor(ids), rows["input_ids"])


@pytest.mark.differs("transformers takes integers as they are, far too loud")
def test_integers_are_scaled_by_the_range_of_their_type(processor, sound):
    integers = (sound(16_080) * 32768).astype(np.int16)
    floats = integers.astype(np.float32) / 32768

    first = processor("Hi", integers)["input_features"]
    second = processor("Hi", floats)["input_features"]

    assert torch.equal(first, second)


@pytest.mark.differs("transformers takes no list of samples")
def test_samples_may_be_an_array_a_tensor_or_a_list(processor):
    samples = [0.25, -0.5] * 200

    arrays = [samples, np.array(samples, dtype=np.float32), torch.tensor(samples)]
    features = [processor("Hi", array)["input_features"] for array in arrays]

    assert torch.equal(features[0], features[1])
    assert torch.equal(features[0], features[2])
