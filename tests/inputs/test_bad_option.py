"""Options and tensors: bad ones are refused by name, and before any work."""

import numpy as np
import pytest
import torch

from af3 import AudioFlamingo3ForConditionalGeneration, GenerationConfig
from processor import AudioFlamingo3Processor
from signals import conversation, sound

from_pretrained = AudioFlamingo3ForConditionalGeneration.from_pretrained


# ---- Loading ----


def test_options_of_loading_that_are_not_supported_are_refused_by_name(micro):
    options = {"attn_implementation": "flash_attention_2", "revision": "v2", "load_in_8bit": True}
    for load in (from_pretrained, AudioFlamingo3Processor.from_pretrained):
        for option, value in options.items():
            with pytest.raises(ValueError, match=f"no option {option}="):
                load(micro, **{option: value})


def test_an_unknown_dtype_is_refused(micro):
    with pytest.raises(ValueError, match="dtype is 'nonsense'"):
        from_pretrained(micro, "cpu", "nonsense")


# ---- The processor ----


@pytest.mark.parametrize(
    "options, named",
    [
        ({"processor_kwargs": {"max_length": 5}}, "max_length=5"),
        ({"audio_kwargs": {"sampling_rate": 8000}}, "sampling_rate is 8000"),
        ({"text_kwargs": {"truncation": True}}, "truncation=True"),
        ({"text_kwargs": 5}, "text_kwargs is 5"),
        ({"tools": ["search"]}, r"tools=\['search'\]"),
        ({"continue_final_message": True}, "continue_final_message=True"),
        ({"truncation": True}, "no option truncation=True"),
        ({"return_tensors": "np"}, "no option return_tensors='np'"),
        ({"output_labels": "answers"}, "output_labels is 'answers'"),
        ({"padding_side": "middle"}, "padding_side is 'middle'"),
    ],
)
def test_an_option_without_a_meaning_here_is_refused_by_name(processor, options, named):
    with pytest.raises(ValueError, match=named):
        processor.apply_chat_template([{"role": "user", "content": "Hi"}], **options)


def test_another_sampling_rate_is_refused(processor):
    message = "sampling_rate is 8000; 16000 Hz is expected"
    with pytest.raises(ValueError, match=message):
        processor("Hi", sound(1600), sampling_rate=8000)
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template(conversation(sound(1600)), sampling_rate=8000)


def test_the_options_of_a_chat_template_are_keywords(processor):
    with pytest.raises(TypeError):
        processor.apply_chat_template([{"role": "user", "content": "Hi"}], False)


# ---- Generation ----


@pytest.mark.parametrize(
    "option, value",
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 2.5),
        ("temperature", "hot"),
        ("top_k", -1),
        ("repetition_penalty", -1.0),
        ("eos_token_id", -1),
        ("pad_token_id", None),
        ("do_sample", "yes"),
    ],
)
def test_an_option_out_of_range_is_reported(option, value):
    with pytest.raises(ValueError, match=f"^{option} is "):
        GenerationConfig(**{"do_sample": True, option: value})


def test_an_unknown_option_is_refused_with_the_known_ones(model, processor):
    message = r"generate\(\) has no option 'num_beams'; it has max_new_tokens, do_sample"
    with pytest.raises(ValueError, match=message):
        model.generate(**processor("Hi"), num_beams=4)


def test_more_tokens_than_positions_are_refused_before_any_work(model, processor, monkeypatch):
    monkeypatch.setattr(model, "prefill", lambda *_, **__: pytest.fail("the prompt was read"))
    with pytest.raises(ValueError, match=r"max_new_tokens=4096 .* 4096 positions"):
        model.generate(**processor("Hi"), max_new_tokens=4096)


# ---- Tensors ----


@pytest.mark.parametrize(
    "mask", [[[1, 1]], [[1, 1, 1]], [[1, 1, 1], [0, 0, 0]]], ids=["shorter", "one row", "padding"]
)
def test_an_attention_mask_must_have_the_shape_of_the_ids_and_a_1_in_every_row(model, mask):
    input_ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    message = "^attention_mask must have the shape of input_ids, and a 1 in every row"
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=message):
            call(input_ids, torch.tensor(mask))


def test_features_without_their_mask_are_refused(model, processor):
    batch = processor("Hi", sound(4000))
    del batch["feature_attention_mask"]
    with pytest.raises(ValueError, match="input_features and feature_attention_mask are expected"):
        model(**batch)


# ---- Any batch ----

LENGTHS = [321, 16080, 479999, 480001]


def test_any_batch_has_as_many_sound_ids_as_audio_frames(model, processor):
    rng = np.random.default_rng(5)
    for _ in range(4):
        lengths = [*rng.choice(LENGTHS, 2), int(rng.integers(321, 100_000))]
        waveforms = [sound(int(samples)) for samples in lengths]
        batch = processor(["Hm?"] * 3, waveforms, padding_side=rng.choice(["left", "right"]))
        audio = batch["input_features"], batch["feature_attention_mask"]
        num_sounds = (batch["input_ids"] == processor.audio_token_id).sum()
        assert num_sounds == len(model.get_audio_features(*audio)), lengths


def test_a_row_does_not_depend_on_the_order_or_the_other_rows_of_its_batch(model, processor):
    rng = np.random.default_rng(5)
    waveforms = [sound(samples) for samples in (321, 40000, 16080, 500000)]
    alone = []
    for waveform in waveforms:
        alone.append(model.generate(**processor("What?", waveform), max_new_tokens=6)[0, -6:])
    for side in ("left", "right"):
        order = rng.permutation(4)[:3]
        batch = processor(["What?"] * 3, [waveforms[i] for i in order], padding_side=side)
        answers = model.generate(**batch, max_new_tokens=6)[:, -6:]
        assert torch.equal(answers, torch.stack([alone[i] for i in order]))
