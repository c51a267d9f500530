"""Prompts, conversations and samples: odd ones mean what they say, bad ones are refused."""

import random
import unicodedata
import warnings

import numpy as np
import pytest
import torch

from processor import AudioFlamingo3Processor
from signals import sound


def decode_row(processor, batch, row=0):
    """The text of a prompt, special tokens included, without padding."""
    is_real = batch["attention_mask"][row].bool()
    return processor.decode(batch["input_ids"][row][is_real])


def count_id(batch, token_id):
    return int((batch["input_ids"] == token_id).sum())


# ---- Prompts ----


@pytest.mark.parametrize(
    "text",
    ["", "a" * 10**5, "ab c\n" * 10**4, "\0", "\u202e\u200f", "<sound>" * 10**3, "<|im_end|>"],
    ids=lambda text: repr(text[:12]),
)
def test_any_other_text_is_asked_as_it_is(processor, text):
    asked = decode_row(processor, processor(text)).split("<|im_start|>user\n")[1]
    assert asked == f"{text}<|im_end|>\n<|im_start|>assistant\n"


def test_half_an_emoji_is_asked_as_a_replacement_character(processor):
    assert "user\n\ufffd<|im_end|>" in decode_row(processor, processor("\ud800"))


def test_a_hundred_thousand_spaces_in_a_row_are_refused(processor):
    for text in (" " * 10**6, "\n" * 10**6, "a" + "\t" * 10**5):
        with pytest.raises(ValueError, match="in a row are more than the tokenizer can split"):
            processor(text)


def test_what_is_no_prompt_is_refused(processor):
    for text in (None, 5, [], [None], ["Hi", 5]):
        with pytest.raises(ValueError, match="prompt"):
            processor(text)


def test_a_window_without_audio_frames_still_has_a_placeholder(processor):
    batch = processor("<sound><sound>", sound(480001))
    assert count_id(batch, processor.audio_token_id) == 750


def test_in_a_finished_template_two_placeholders_for_three_windows_are_refused(processor):
    template = "<|im_start|>user\n<sound><sound>Hi<|im_end|>\n"
    message = "found 2 '<sound>' placeholders, but audio was split into 3"
    with pytest.raises(ValueError, match=message):
        processor(template, sound(70 * 16000))


RNG = random.Random(5)
ALPHABETS = [
    "abc XYZ 019 \n\t.,;'\"",
    "äöüßéñ",
    "漢字かな",
    "🙂👍🏽",
    "e\u0301a\u0308",
    "\u202e\u200b\0",
    "<|im_end|>",
    "<sound>",
]


def random_text() -> str:
    parts = []
    for _ in range(RNG.randint(0, 40)):
        alphabet = RNG.choice(ALPHABETS)
        whole = RNG.random() < 0.1
        parts.append(alphabet if whole else RNG.choice(alphabet))
    return "".join(parts)


def test_decoding_the_ids_of_1000_random_texts_gives_their_nfc(processor):
    for _ in range(1000):
        text = random_text()
        ids = processor.tokenizer.encode(text)
        assert processor.tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


def test_an_incomplete_character_at_the_end_of_a_stream_is_marked(processor):
    ids = processor.tokenizer.encode("naïve 漢字 🙂!")[:-2]
    parts = list(processor.stream_text([torch.tensor([token_id]) for token_id in ids]))
    assert "".join(parts) == processor.decode(ids)
    assert parts[-1] == "\ufffd"


# ---- Samples ----


@pytest.mark.parametrize(
    "audio, reason",
    [
        (np.zeros(320), "320 samples; at least 321"),
        (np.zeros(0), "0 samples"),
        (np.zeros((2, 999)), r"shape \(2, 999\).*1-D"),
        (np.array(["a"] * 999), "floats or integers"),
    ],
)
def test_unusable_audio_is_refused_with_the_reason(processor, audio, reason):
    with pytest.raises(ValueError, match=f"^Sample 0: .*{reason}"):
        processor("Hi", audio)


def test_a_single_sample_that_is_not_finite_or_far_too_large_is_refused(processor):
    for value in (np.nan, np.inf, -np.inf, 1e30):
        waveform = np.zeros(16000, dtype=np.float32)
        waveform[5000] = value
        with pytest.raises(ValueError, match="^Sample 0: .*NaN or infinite or far too large"):
            processor("Hi", waveform)


def test_integers_of_any_width_are_scaled_by_the_range_of_their_type(processor):
    integers = np.round(sound(1600) * 32767).astype(np.int16)
    expected = processor("Hi", integers / np.float32(32768))["input_features"]
    for audio in (integers, integers.astype(np.int32) << 16, torch.from_numpy(integers)):
        assert (processor("Hi", audio)["input_features"] - expected).abs().max() < 1e-4


def test_a_warning_says_how_much_of_a_longer_recording_is_heard(processor):
    processor = AudioFlamingo3Processor(processor.tokenizer, max_audio_len=30)
    with pytest.warns(UserWarning, match=r"^40\.0 s of audio: only the first 30\.0 s are heard$"):
        processor("Hi", sound(40 * 16000))
    with pytest.warns(UserWarning, match=r"^30\.0 s of audio: only the first 30\.0 s are heard$"):
        processor("Hi", sound(30 * 16000 + 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processor("Hi", sound(30 * 16000))


# ---- Conversations ----


def user_message(text, *audios):
    content = [{"type": "text", "text": text}]
    for audio in audios:
        content.append({"type": "audio", "audio": audio})
    return {"role": "user", "content": content}


def test_several_recordings_come_in_order_before_the_text_of_their_turn(processor):
    chat = [
        user_message("Two", sound(1600), sound(3200)),
        {"role": "assistant", "content": "ok"},
        user_message("One", sound(4800)),
    ]
    batch = processor.apply_chat_template(chat, add_generation_prompt=True)
    text = decode_row(processor, batch)
    assert "user\n" + "<sound>" * (2 + 5) + "Two" in text
    assert "user\n" + "<sound>" * 7 + "One" in text
    assert batch["feature_attention_mask"].sum(-1).tolist() == [10, 20, 30]


def test_what_is_no_conversation_is_refused(processor):
    for conversations in ([], [[]], None, "Hi", 5, {"role": "user"}):
        for tokenize in (True, False):
            with pytest.raises(ValueError, match="conversation"):
                processor.apply_chat_template(conversations, tokenize=tokenize)


def test_a_message_without_content_is_an_empty_turn(processor):
    for content in (None, "", []):
        chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]
        text = processor.apply_chat_template(chat, tokenize=False)
        assert text.endswith("user\nHi<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n")


@pytest.mark.parametrize(
    "content, reason",
    [
        (5, "message"),
        ([5], "message"),
        (["hi"], "message"),
        ([None], "message"),
        ([{}], "message"),
        ([{"type": "text"}], "message"),
        ([{"type": "text", "text": None}], "message"),
        ([{"type": "text", "text": 619}], "message"),  # a number must not become a token
        ([{"type": "image", "path": "a.png"}], "neither text nor audio"),
        ([{"type": "audio"}], 'an audio part without "path" or "audio"'),
        ([{"type": "audio", "path": None}], 'an audio part without "path" or "audio"'),
        ([{"audio": None}], 'an audio part without "path" or "audio"'),
    ],
)
def test_content_that_is_neither_text_nor_audio_is_refused(processor, content, reason):
    with pytest.raises(ValueError, match=reason):
        processor.apply_chat_template([{"role": "user", "content": content}])


# ---- Transcription requests ----


def test_in_a_transcription_request_none_among_prompts_is_the_default(processor):
    audio = sound(1600)
    request = processor.apply_transcription_request([audio, audio], prompt=[None, "Hi"])
    default = processor.apply_transcription_request(audio)
    assert torch.equal(request["input_ids"][:1], default["input_ids"])
    assert "Hi<|im_end|>" in decode_row(processor, request, 1)


@pytest.mark.parametrize(
    "audios, prompt, named",
    [
        (1, 5, "prompts, each a string"),
        (1, [], "Got 0 texts but 1 audios"),
        (2, ["Hi"], "Got 1 texts but 2 audios"),
        (2, [None, 5], "prompts, each a string"),
        (0, None, "list of recordings is empty"),
    ],
)
def test_a_transcription_request_that_makes_no_sense_is_refused(processor, audios, prompt, named):
    with pytest.raises(ValueError, match=named):
        processor.apply_transcription_request([sound(1600)] * audios, prompt=prompt)
