"""Labels of the assistant's answers alone, for training."""

import pytest
import torch

from processor import AudioFlamingo3Processor
from signals import conversation, sound


def labeled_text(processor, batch, row=0):
    labels = batch["labels"][row]
    return processor.decode(labels[labels != -100])


def exchange(question, answer):
    """A question about a recording of 0.1 s, and the answer."""
    return [*conversation(sound(1600), question), {"role": "assistant", "content": answer}]


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_answer_labels_cover_only_the_reply_and_its_end(processor, padding_side):
    chats = [exchange("What is it?", "rain"), exchange("Hi", "seven three one")]
    batch = processor.apply_chat_template(chats, output_labels="answer", padding_side=padding_side)
    assert labeled_text(processor, batch, 0) == "rain<|im_end|>"
    assert labeled_text(processor, batch, 1) == "seven three one<|im_end|>"
    is_labeled = batch["labels"] != -100
    assert torch.equal(batch["labels"][is_labeled], batch["input_ids"][is_labeled])


def test_every_turn_of_the_assistant_is_labeled(processor):
    chat = [*exchange("One?", "rain"), *exchange("Two?", "sea waves")]
    batch = processor.apply_chat_template(chat, output_labels="answer")
    assert labeled_text(processor, batch) == "rain<|im_end|>sea waves<|im_end|>"


def test_newlines_that_begin_an_answer_are_labeled_with_the_token_that_they_share(
    official_tokenizer,
):
    processor = AudioFlamingo3Processor(official_tokenizer)
    batch = processor.apply_chat_template(exchange("Hi", "\n\nrain"), output_labels="answer")
    assert labeled_text(processor, batch) == "\n\n\nrain<|im_end|>"


def test_a_finished_template_has_answer_labels_too(processor):
    prompt = "<|im_start|>user\nassistant\n<|im_end|>\n<|im_start|>assistant\nrain<|im_end|>\n"
    batch = processor(prompt, output_labels="answer")
    assert labeled_text(processor, batch) == "rain<|im_end|>"


def test_a_prompt_without_an_answer_has_no_answer_labels(processor):
    prompt = "Say <|im_start|>assistant\nrain<|im_end|>"  # spelled out, so plain text
    batch = processor(prompt, sound(1600), output_labels="answer")
    assert (batch["labels"] == -100).all()
