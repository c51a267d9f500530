"""The token ids and the chat templates of transformers, recorded by make_goldens.py."""

import json

import numpy as np
import pytest

from places import DATA, TINY
from processor import AudioFlamingo3Processor, Tokenizer
from signals import CHAT

GOLDENS = json.loads((DATA / "goldens.json").read_text(encoding="utf-8"))


def test_ids_are_those_of_transformers():
    tokenizer = Tokenizer(TINY)
    for text, ids in GOLDENS["tiny"].items():
        assert tokenizer.encode(text) == ids, text


def test_ids_of_the_official_tokenizer_are_those_of_transformers(official_tokenizer):
    for text, ids in GOLDENS["qwen"].items():
        assert official_tokenizer.encode(text) == ids, text
    assert official_tokenizer.added_tokens["<sound>"] == 151669
    assert official_tokenizer.eos_token_id == 151645
    assert official_tokenizer.pad_token_id == 151671


def test_neighboring_texts_are_encoded_as_one(official_tokenizer):
    assert official_tokenizer.encode_pieces(["user\n", "\nhi"])[-2] == 271  # "\n\n", not two "\n"


def test_the_text_of_a_chat_template_is_that_of_transformers(processor):
    for golden in GOLDENS["templates"]:
        options = {"tokenize": False, "add_generation_prompt": golden["prompt"]}
        assert processor.apply_chat_template(golden["chat"], **options) == golden["text"]


@pytest.mark.parametrize("family", ["music", "next"])
def test_the_text_of_a_chat_of_the_siblings_is_that_of_transformers(families, family):
    processor = AudioFlamingo3Processor.from_pretrained(families[family])
    text = processor.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert text == str(np.load(DATA / "music_goldens.npz")[f"{family}.template"])
