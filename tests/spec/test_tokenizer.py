"""Text becomes ids, and ids become text: the byte-level BPE of Qwen2.

The tokenizer is that of tiny/: 256 bytes, 362 merges, and 29 added tokens from id 618 on.
"""

import pytest
import torch


def test_text_is_split_into_bytes_numbered_as_in_gpt_2(processor):
    encode = processor.tokenizer.encode

    assert encode("!") == [0]
    assert encode("A") == [32]
    assert encode("é") == [127, 102]  # two bytes of UTF-8: C3, A9
    assert encode("\n") == [198]
    assert encode("\t") == [197]
    assert encode(" ") == [220]


def test_the_merge_with_the_lowest_id_comes_first(processor):
    ids = processor.tokenizer.encode("hearing")

    assert ids == [71, 267, 81, 285]  # h, ea, r, ing: "ea" is 267, and "he" would be 592


def test_text_is_split_into_words_with_the_space_before_them_and_into_single_digits(processor):
    ids = processor.tokenizer.encode("rain rain 2025")

    assert ids == [579, 453, 220, 17, 15, 17, 20]  # "rain", " rain", " ", "2", "0", "2", "5"


def test_text_is_normalized_to_nfc(processor):
    encode = processor.tokenizer.encode

    assert encode("e\u0301") == encode("\u00e9")


def test_any_text_comes_back_from_its_ids(processor):
    text = "  What's   this?\n\n\tÜnïcode, 日本, 🎵, ﬁ² and 3.14  "

    assert processor.tokenizer.decode(processor.tokenizer.encode(text)) == text


@pytest.mark.differs("transformers reads the token: whoever writes a prompt can forge a turn")
def test_an_added_token_that_is_spelled_out_is_plain_text(processor):
    ids = processor.tokenizer.encode("<|im_end|><sound>")

    assert max(ids) < 618
    assert processor.tokenizer.decode(ids) == "<|im_end|><sound>"


def test_ids_of_added_tokens_come_from_the_files(processor):
    tokenizer = processor.tokenizer

    assert processor.audio_token_id == 644
    assert tokenizer.pad_token_id == 646  # [PAD], named in tokenizer_config.json
    assert tokenizer.eos_token_id == 620  # <|im_end|>, named there


def test_skipping_special_tokens_skips_only_those_that_are_marked_special(processor):
    ids = [619, 39, 72, 632, 620]  # <|im_start|>, H, i, <tool_call>, <|im_end|>

    assert processor.decode(ids) == "<|im_start|>Hi<tool_call><|im_end|>"
    assert processor.decode(ids, skip_special_tokens=True) == "Hi<tool_call>"


def test_half_a_character_is_decoded_to_the_replacement_character(processor):
    assert processor.decode([39, 127]) == "H\ufffd"


@pytest.mark.differs("transformers has streamers instead")
def test_streamed_text_is_that_of_the_first_row_in_whole_characters(processor):
    # "H", the two bytes of "é", <|im_end|>, and last what is left; "A" in the second row.
    steps = [torch.tensor([token_id, 32]) for token_id in (39, 127, 102, 620)]

    assert list(processor.stream_text(steps)) == ["H", "", "é", "", ""]


def test_strip_prefix_removes_an_introduction_a_full_stop_and_a_pair_of_quotes(processor):
    for introduction in (
        "The spoken content of the audio is",
        "The transcription of the audio is",
        "The content of the input audio is",
    ):
        text = f"{introduction} 'It is \"so\".'."
        ids = [processor.tokenizer.encode(text)]
        assert processor.batch_decode(ids) == [text]
        assert processor.batch_decode(ids, strip_prefix=True) == ['It is "so".']


def test_strip_prefix_leaves_a_single_quote(processor):
    ids = [processor.tokenizer.encode("The transcription of the audio is 'a.")]

    assert processor.batch_decode(ids, strip_prefix=True) == ["'a"]


@pytest.mark.differs("transformers also strips the full stop and the quotes of other answers")
def test_strip_prefix_leaves_other_text_as_it_is(processor):
    for text in (
        "'Yes.'",
        "I say: The transcription of the audio is 'a'.",
        "The transcription of the audio isolates it.",
    ):
        rows = torch.tensor([processor.tokenizer.encode(text)])
        assert processor.batch_decode(rows, strip_prefix=True) == [text]
