"""random_checkpoint.py writes a checkpoint that has the tokenizer of another."""

import sys

import random_checkpoint
from af3 import AudioFlamingo3ForConditionalGeneration
from places import TINY
from processor import AudioFlamingo3Processor
from signals import sound


def test_a_random_checkpoint_has_the_tokenizer_of_its_source(tmp_path, monkeypatch):
    folder = tmp_path / "small"
    monkeypatch.setattr(sys, "argv", ["", str(TINY), str(folder), "--small"])
    random_checkpoint.main()
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(folder, "cpu")
    processor = AudioFlamingo3Processor.from_pretrained(folder)
    batch = processor("Hi", sound(9000))
    assert model.config.text_config.num_attention_heads == 6
    assert model(**batch).logits.std() > 0.1
    assert model.generate(**batch, max_new_tokens=3, eos_token_id=[]).shape[1] == 3 + len(
        batch["input_ids"][0]
    )
