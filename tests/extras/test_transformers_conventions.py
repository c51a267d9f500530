"""Code that is written for transformers runs here: its names, its options, its examples."""

import torch

from af3 import AudioFlamingo3ForConditionalGeneration, MusicFlamingoForConditionalGeneration
from processor import AudioFlamingo3Processor, MusicFlamingoProcessor
from signals import conversation, sound, write_wav

from_pretrained = AudioFlamingo3ForConditionalGeneration.from_pretrained


def new_ids(model, batch, **options):
    return model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]


def assert_same(batch, expected):
    assert batch.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(batch[name], tensor), name


# ---- The published examples ----


def test_the_published_chat_example_gives_the_answers_of_plain_calls(micro, model, processor):
    loaded = from_pretrained(micro, device_map="auto", dtype="float32").eval()
    prompts = ["Transcribe the input speech.", "Describe the song."]
    sounds = [sound(40000), sound(500000)]
    batch = processor.apply_chat_template(
        [conversation(waveform, prompt) for waveform, prompt in zip(sounds, prompts)],
        tokenize=True,
        add_generation_prompt=True,
        sampling_rate=getattr(processor.feature_extractor, "sampling_rate", 16000),
        return_dict=True,
    ).to(loaded.device)
    gen_ids = loaded.generate(**batch, max_new_tokens=5)
    new_tokens = gen_ids[:, batch["input_ids"].shape[1] :]
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    texts = processor.batch_decode(new_tokens, **options)
    expected = []
    for waveform, prompt in zip(sounds, prompts):
        ids = new_ids(model, processor(prompt, waveform), max_new_tokens=5)[0]
        expected.append(processor.decode(ids, skip_special_tokens=True))
    assert texts == expected


def test_the_published_processor_example_gives_the_answers_of_plain_calls(micro, model, processor):
    loaded = from_pretrained(micro, device_map="auto", dtype="float32").eval()
    prompts = ["Transcribe the input speech.", "<sound><sound>\nDescribe the ambience."]
    sounds = [sound(40000), sound(500000)]
    inputs = processor(prompts, sounds, padding_side="left", tensor_type="pt").to(loaded.device)
    ids = loaded.generate(**inputs, max_new_tokens=5)
    texts = processor.batch_decode(ids, skip_special_tokens=True)
    for text, waveform, prompt in zip(texts, sounds, prompts):
        answer = new_ids(model, processor(prompt, waveform), max_new_tokens=5)[0]
        end = "\nassistant\n" + processor.decode(answer, skip_special_tokens=True)
        assert text.endswith(end)


def test_the_published_training_example_gives_the_loss_of_plain_calls(micro, model, processor):
    loaded = from_pretrained(micro, device_map="cpu")
    loaded.train()
    chat = conversation(sound(9000), "What sound is this?")
    batch = processor.apply_chat_template(
        [chat],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        processor_kwargs={"output_labels": True},
    ).to(loaded.device)
    loss = loaded(**batch).loss
    loss.backward()
    expected = model(**processor("What sound is this?", sound(9000), output_labels=True)).loss
    assert torch.equal(loss, expected)
    assert all(parameter.grad.isfinite().all() for parameter in loaded.parameters())


# ---- Names ----


def test_the_siblings_have_the_names_of_transformers():
    assert MusicFlamingoForConditionalGeneration is AudioFlamingo3ForConditionalGeneration
    assert MusicFlamingoProcessor is AudioFlamingo3Processor


def test_the_model_takes_the_feature_mask_by_transformers_name(model, processor):
    batch = processor("Hi", sound(4000))
    expected = new_ids(model, batch, max_new_tokens=4)
    logits = model(**batch).logits
    batch = dict(batch)
    batch["input_features_mask"] = batch.pop("feature_attention_mask")
    assert torch.equal(new_ids(model, batch, max_new_tokens=4), expected)
    assert torch.equal(model(**batch).logits, logits)


def test_a_batch_answers_to_transformers_name_of_the_feature_mask(processor):
    batch = processor("Hi", sound(1600))
    mask = batch["feature_attention_mask"]
    assert batch["input_features_mask"] is batch.input_features_mask is mask
    assert batch.get("input_features_mask") is mask
    assert "input_features_mask" in batch
    batch["input_features_mask"] = mask + 0
    assert batch["feature_attention_mask"] is not mask
    assert list(batch).count("feature_attention_mask") == 1
    assert batch.pop("input_features_mask") is not mask
    assert "feature_attention_mask" not in batch


def test_the_tensors_of_a_batch_are_attributes_too(processor):
    batch = processor("Hi", sound(1600))
    assert batch.input_ids is batch["input_ids"]
    assert not hasattr(batch, "labels")


def test_to_takes_a_dtype_alone(processor):
    batch = processor("Hi", sound(1600)).to(torch.bfloat16)
    assert batch["input_features"].dtype == torch.bfloat16
    assert batch["input_ids"].dtype == torch.int64


def test_the_key_of_a_file_may_be_path_audio_or_url(processor, tmp_path):
    path = write_wav(tmp_path / "a.wav", sound(16000))
    for key in ("path", "audio", "url"):
        message = {"role": "user", "content": [{"type": "audio", key: str(path)}]}
        batch = processor.apply_chat_template([message])
        assert (batch["input_ids"] == processor.audio_token_id).sum() == 25


def test_rows_of_ids_become_a_list_of_texts(processor):
    ids = torch.tensor([[72, 73], [74, 75]])
    texts = [processor.decode(ids[0]), processor.decode(ids[1])]
    for rows in (ids, ids.numpy(), ids.tolist(), [*ids]):
        assert processor.decode(rows) == processor.batch_decode(rows) == texts


def test_a_single_id_has_a_text(processor):
    assert processor.decode(72) == processor.decode(torch.tensor(72)) == processor.decode([72])


def test_torch_dtype_is_another_name_for_dtype(micro):
    assert from_pretrained(micro, "cpu", torch_dtype=torch.bfloat16).dtype == torch.bfloat16


# ---- Options ----


def test_options_may_come_in_the_groups_of_transformers(processor):
    chat = conversation(sound(1600), "Hi")
    expected = processor.apply_chat_template(chat, output_labels=True, padding_side="right")
    options = {"output_labels": True, "padding_side": "right", "audio_kwargs": {"padding": True}}
    for group in ("processor_kwargs", "text_kwargs", "common_kwargs"):
        assert_same(processor.apply_chat_template(chat, **{group: options}), expected)


def test_options_of_the_processor_that_say_what_is_always_done_are_taken(processor):
    expected = processor("Hi", sound(4000))
    options = {"return_tensors": "pt", "padding": True, "sampling_rate": 16000}
    assert_same(processor("Hi", sound(4000), **options), expected)


def test_options_of_generate_that_ask_for_nothing_else_are_taken(model, processor):
    batch = processor("Hi", output_labels=True)
    plain = model.generate(batch["input_ids"], max_new_tokens=4)
    options = {"num_beams": 1, "use_cache": True, "min_p": None, "no_repeat_ngram_size": 0}
    assert torch.equal(model.generate(**batch, max_new_tokens=4, **options), plain)


def test_options_of_loading_that_change_nothing_are_taken(micro, model):
    options = {"attn_implementation": "sdpa", "trust_remote_code": True, "low_cpu_mem_usage": True}
    loaded = from_pretrained(micro, device_map="cpu", **options)
    assert loaded.config == model.config
    assert AudioFlamingo3Processor.from_pretrained(micro, trust_remote_code=True)
