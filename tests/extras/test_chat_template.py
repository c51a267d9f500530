"""The system message in a checkpoint's chat template, and templates that are refused."""

import json

import pytest

from checkpoints import change_json
from places import TINY
from processor import AudioFlamingo3Processor


def template_with(message: str) -> str:
    """The template in tiny/, with another system message."""
    template = (TINY / "chat_template.jinja").read_text(encoding="utf-8")
    return template.replace("You are a helpful assistant.", message)


def test_the_system_message_is_read_from_each_place_that_may_have_a_template(spoiled):
    def system_message():
        return AudioFlamingo3Processor.from_pretrained(spoiled).system_message

    (spoiled / "chat_template.jinja").write_text(template_with("C"))
    assert system_message() == "C"
    (spoiled / "chat_template.json").write_text(json.dumps({"chat_template": template_with("B")}))
    assert system_message() == "B"
    change_json(spoiled / "processor_config.json", chat_template=template_with("A"))
    assert system_message() == "A"


BEFORE_TURNS = "<|im_start|>system\nS<|im_end|>\n{% for m in messages %}<|im_start|>{{ m.role }}\n"
IN_ORDER = """{% for c in m.content %}{% if c.type == 'audio' %}<sound>{% else %}{{ c.text }}
{% endif %}{% endfor %}<|im_end|>{% endfor %}"""
TEXT_FIRST = "{{ text }}{% if audio %}{{ '<sound>' }}{% endif %}<|im_end|>{% endfor %}{{ more }}"
AUDIO_FIRST = "{% if audio %}{{ '<sound>' }}{% endif %}{{ text }}<|im_end|>{% endfor %}"


@pytest.mark.parametrize("turn", [IN_ORDER, TEXT_FIRST])
def test_a_template_that_orders_text_and_audio_otherwise_is_refused(spoiled, turn):
    (spoiled / "chat_template.jinja").write_text(BEFORE_TURNS + turn)
    with pytest.raises(ValueError, match="chat_template.jinja: .* audio before text"):
        AudioFlamingo3Processor.from_pretrained(spoiled)


@pytest.mark.parametrize("turn", [AUDIO_FIRST, "{{ m.content }}<|im_end|>{% endfor %}"])
def test_a_template_with_audio_before_text_or_without_audio_is_read(spoiled, turn):
    (spoiled / "chat_template.jinja").write_text(BEFORE_TURNS + turn)
    assert AudioFlamingo3Processor.from_pretrained(spoiled).system_message == "S"


def test_without_a_template_the_system_message_is_the_usual_one(spoiled):
    processor = AudioFlamingo3Processor.from_pretrained(spoiled)
    text = processor.decode(processor("Hi")["input_ids"][0])
    assert text.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")


def test_a_system_message_may_be_in_a_string_of_the_template(spoiled):
    template = "{{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}"
    (spoiled / "chat_template.jinja").write_text(template)
    processor = AudioFlamingo3Processor.from_pretrained(spoiled)
    assert processor.system_message == "Be brief."


@pytest.mark.parametrize("template", ["", "<|im_start|>system\n{{ message }}<|im_end|>\n"])
def test_a_template_without_a_system_message_is_refused(spoiled, template):
    (spoiled / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match="chat_template.jinja: no system message"):
        AudioFlamingo3Processor.from_pretrained(spoiled)
