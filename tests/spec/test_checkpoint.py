"""A directory holds the model: its configuration, its tensors, and the processor's files."""

import json
import os

import numpy as np
import pytest
import torch

import load_weights
from af3 import AudioFlamingo3ForConditionalGeneration
from processor import AudioFlamingo3Processor

# All tensors but those of further layers.
NAMES = """
audio_tower.conv1.bias
audio_tower.conv1.weight
audio_tower.conv2.bias
audio_tower.conv2.weight
audio_tower.embed_positions.weight
audio_tower.layer_norm.bias
audio_tower.layer_norm.weight
audio_tower.layers.0.fc1.bias
audio_tower.layers.0.fc1.weight
audio_tower.layers.0.fc2.bias
audio_tower.layers.0.fc2.weight
audio_tower.layers.0.final_layer_norm.bias
audio_tower.layers.0.final_layer_norm.weight
audio_tower.layers.0.self_attn.k_proj.weight
audio_tower.layers.0.self_attn.out_proj.bias
audio_tower.layers.0.self_attn.out_proj.weight
audio_tower.layers.0.self_attn.q_proj.bias
audio_tower.layers.0.self_attn.q_proj.weight
audio_tower.layers.0.self_attn.v_proj.bias
audio_tower.layers.0.self_attn.v_proj.weight
audio_tower.layers.0.self_attn_layer_norm.bias
audio_tower.layers.0.self_attn_layer_norm.weight
language_model.lm_head.weight
language_model.model.embed_tokens.weight
language_model.model.layers.0.input_layernorm.weight
language_model.model.layers.0.mlp.down_proj.weight
language_model.model.layers.0.mlp.gate_proj.weight
language_model.model.layers.0.mlp.up_proj.weight
language_model.model.layers.0.post_attention_layernorm.weight
language_model.model.layers.0.self_attn.k_proj.bias
language_model.model.layers.0.self_attn.k_proj.weight
language_model.model.layers.0.self_attn.o_proj.weight
language_model.model.layers.0.self_attn.q_proj.bias
language_model.model.layers.0.self_attn.q_proj.weight
language_model.model.layers.0.self_attn.v_proj.bias
language_model.model.layers.0.self_attn.v_proj.weight
language_model.model.norm.weight
multi_modal_projector.linear_1.bias
multi_modal_projector.linear_1.weight
multi_modal_projector.linear_2.bias
multi_modal_projector.linear_2.weight
""".split()

# What the network computes, and another value, which is refused.
SETTINGS = {
    "activation_function": ("gelu", "relu"),
    "hidden_act": ("silu", "gelu"),
    "projector_hidden_act": ("gelu", "relu"),
    "projector_bias": (True, False),
    "scale_embedding": (False, True),
    "use_sliding_window": (False, True),
    "tie_word_embeddings": (False, True),
    "rope_type": ("default", "yarn"),
    "num_mel_bins": (128, 80),
    "max_source_positions": (1500, 750),
}
FEATURES = {
    "sampling_rate": (16000, 44100),
    "chunk_length": (30, 20),
    "feature_size": (128, 80),
    "n_fft": (400, 512),
    "hop_length": (160, 80),
    "dither": (0, 0.1),
    "padding_value": (0, 1),
}
PROMPT = torch.tensor([[619, 562, 198, 39, 72]])


def load(folder, **options):
    return AudioFlamingo3ForConditionalGeneration.from_pretrained(
        folder, device_map="cpu", **options
    )


def change(path, section=None, **fields):
    """Changes fields of a JSON file, or of a section in it; ... removes a field."""
    content = json.loads(path.read_text()) if path.exists() else {}
    place = content if section is None else content[section]
    for key, value in fields.items():
        place[key] = value
        if value is ...:
            del place[key]
    path.write_text(json.dumps(content))


def seconds_heard(folder, seconds=100):
    """How much the processor of a checkpoint hears of so many seconds of silence."""
    processor = AudioFlamingo3Processor.from_pretrained(folder)
    silence = np.zeros(seconds * 16000, dtype=np.float32)
    return int(processor("Hi", silence)["feature_attention_mask"].sum()) / 100


def is_same(tensors, others):
    """Whether two pairs of names and tensors hold the same."""
    tensors, others = dict(tensors), dict(others)
    return set(tensors) == set(others) and all(
        torch.equal(tensors[name], others[name]) for name in tensors
    )


# ---- The model ----


def test_the_tensors_in_a_file_have_these_names(checkpoint):
    names = [name for name, _ in load_weights.read_tensors(checkpoint)]

    assert sorted(name for name in names if ".layers.1." not in name) == NAMES


def test_a_model_that_is_saved_and_loaded_gives_the_same_logits(model, checkpoint):
    loaded = load(checkpoint)

    assert not loaded.training
    assert torch.equal(loaded(PROMPT).logits, model(PROMPT).logits)


def test_a_model_has_the_dtype_of_its_checkpoint_or_the_one_that_is_asked_for(checkpoint):
    assert load(checkpoint).dtype == torch.float32
    assert load(checkpoint, dtype="bfloat16").dtype == torch.bfloat16
    assert load(checkpoint, dtype=torch.bfloat16).dtype == torch.bfloat16

    load(checkpoint, dtype=torch.bfloat16).save_pretrained(checkpoint)

    assert load(checkpoint).dtype == torch.bfloat16


@pytest.mark.differs("transformers gives tensors that are missing random values")
def test_a_tensor_that_is_missing_or_not_expected_or_of_another_shape_is_refused_by_name(
    checkpoint,
):
    for field, value, name in [
        ("num_hidden_layers", 3, "language_model.model.layers.2."),
        ("num_hidden_layers", 1, "language_model.model.layers.1."),
        ("intermediate_size", 97, "language_model.model.layers.0.mlp.gate_proj.weight"),
    ]:
        original = (checkpoint / "config.json").read_text()
        change(checkpoint / "config.json", "text_config", **{field: value})
        with pytest.raises(ValueError, match=name):
            load(checkpoint)
        (checkpoint / "config.json").write_text(original)


@pytest.mark.differs("transformers loads whatever the file is")
def test_a_checkpoint_of_another_model_is_refused(checkpoint):
    change(checkpoint / "config.json", model_type="qwen2_audio")

    with pytest.raises(ValueError, match="config.json: model_type is 'qwen2_audio'; an audiofl"):
        load(checkpoint)


# ---- The layouts ----


def test_tensors_may_be_in_several_files_that_an_index_names(checkpoint, sharded_checkpoint):
    tensors = load_weights.read_tensors(sharded_checkpoint)

    assert is_same(tensors, load_weights.read_tensors(checkpoint))


def test_where_there_are_an_index_and_a_single_file_the_files_of_the_index_are_read(
    checkpoint, sharded_checkpoint
):
    single = sharded_checkpoint / "model.safetensors"
    single.write_text("not read")
    os.utime(single, (0, 0))

    tensors = load_weights.read_tensors(sharded_checkpoint)

    assert is_same(tensors, load_weights.read_tensors(checkpoint))


def test_the_original_layout_holds_the_same_tensors_under_older_names(
    checkpoint, original_checkpoint
):
    tensors = load_weights.read_tensors(original_checkpoint)

    assert is_same(tensors, load_weights.read_tensors(checkpoint))


def test_the_original_layout_holds_the_same_sizes_under_older_names(
    checkpoint, original_checkpoint
):
    sections, _ = load_weights.read_configs(checkpoint)

    others, _ = load_weights.read_configs(original_checkpoint)

    for section in ("audio_config", "text_config"):
        for key, value in others[section].items():
            assert sections[section][key] == value
        assert len(others[section]) > 5


def test_these_are_the_older_names():
    for older, name in {
        "sound_tower.conv1.bias": "audio_tower.conv1.bias",
        "sound_tower.audio_tower.conv1.bias": "audio_tower.conv1.bias",
        "sound_mm_projector.layers.0.bias": "multi_modal_projector.linear_1.bias",
        "sound_mm_projector.layers.2.bias": "multi_modal_projector.linear_2.bias",
        "llm.model.norm.weight": "language_model.model.norm.weight",
        "model.audio_tower.conv1.bias": "audio_tower.conv1.bias",
        "model.multi_modal_projector.linear_1.bias": "multi_modal_projector.linear_1.bias",
        "model.language_model.norm.weight": "language_model.model.norm.weight",
        "lm_head.weight": "language_model.lm_head.weight",
    }.items():
        assert load_weights.model_name(older) == name


# ---- config.json ----


def test_rope_theta_may_stand_alone_or_in_rope_parameters_and_is_10000_if_absent(checkpoint):
    for fields, rope_theta in [
        ({"rope_parameters": {"rope_theta": 500.0}}, 500.0),
        ({"rope_parameters": ..., "rope_theta": 600.0}, 600.0),
        ({"rope_theta": None}, 10000.0),
        ({"rope_theta": ...}, 10000.0),
    ]:
        change(checkpoint / "config.json", "text_config", **fields)

        assert load_weights.read_configs(checkpoint)[0]["text_config"]["rope_theta"] == rope_theta


def test_null_in_a_configuration_means_absent(checkpoint):
    absent = {"rms_norm_eps": None, "rope_parameters": None, "rope_theta": None}
    change(checkpoint / "config.json", "text_config", **absent)
    change(checkpoint / "generation_config.json", max_new_tokens=None, pad_token_id=None)

    config, options = load_weights.read_configs(checkpoint)

    assert "rms_norm_eps" not in config["text_config"]
    assert config["text_config"]["rope_theta"] == 10000
    assert "max_new_tokens" not in options
    assert options["pad_token_id"] == 646  # [PAD]: the tokenizer's


def test_a_network_with_another_setting_is_refused_by_name(checkpoint):
    path = checkpoint / "config.json"
    change(path, "text_config", rope_parameters=..., rope_theta=1e6)
    for section in (None, "audio_config", "text_config"):
        for key, (value, other) in SETTINGS.items():
            change(path, section, **{key: other})
            message = f"config.json: {key} is {other!r}; only {value!r} is supported"
            with pytest.raises(ValueError, match=message):
                load_weights.read_configs(checkpoint)

            change(path, section, **{key: value})
            load_weights.read_configs(checkpoint)


def test_the_vocabulary_must_be_that_of_the_tokenizer(checkpoint):
    path = checkpoint / "config.json"
    change(path, "text_config", vocab_size=646)
    with pytest.raises(ValueError, match="vocab_size is 646 and .* has 647 tokens"):
        load_weights.read_configs(checkpoint)

    change(path, "text_config", vocab_size=647)
    change(path, audio_token_id=643)
    with pytest.raises(ValueError, match="<sound> is 643; .* of which <sound> is 644"):
        load_weights.read_configs(checkpoint)


def test_the_vocabulary_may_have_rows_without_a_text_which_are_no_answer(checkpoint):
    change(checkpoint / "config.json", "text_config", vocab_size=700)

    config, _ = load_weights.read_configs(checkpoint)

    assert config["text_config"]["vocab_size"] == 700
    assert config["num_tokens"] == 647


def test_without_its_id_in_the_file_sound_has_the_id_of_the_tokenizer(checkpoint):
    change(checkpoint / "config.json", audio_token_id=...)

    assert load_weights.read_configs(checkpoint)[0]["audio_token_id"] == 644


# ---- generation_config.json ----


def test_generate_does_what_generation_config_json_says(checkpoint):
    change(checkpoint / "generation_config.json", max_new_tokens=3)

    assert load(checkpoint).generate(PROMPT).shape == (1, 5 + 3)


def test_the_end_and_the_padding_of_an_answer_are_named_there_or_else_by_the_tokenizer(checkpoint):
    path = checkpoint / "generation_config.json"
    for fields, end, padding in [
        ({"eos_token_id": [620, 618], "pad_token_id": 618}, [620, 618], 618),
        ({}, 620, 646),  # <|im_end|>, [PAD]
    ]:
        path.write_text(json.dumps(fields))
        _, options = load_weights.read_configs(checkpoint)
        assert options == {"eos_token_id": end, "pad_token_id": padding}


def test_an_option_out_of_its_range_is_refused_by_its_name_and_the_files(checkpoint):
    change(checkpoint / "generation_config.json", max_new_tokens=0)

    with pytest.raises(ValueError, match="generation_config.json: max_new_tokens is 0; "):
        load_weights.read_configs(checkpoint)


# ---- The processor's files ----


def test_max_audio_len_is_the_number_of_seconds_that_are_heard_in_whole_windows(checkpoint):
    for seconds, heard in [(60, 60), (70, 60), (30, 30)]:
        change(checkpoint / "processor_config.json", max_audio_len=seconds)

        assert seconds_heard(checkpoint) == heard


@pytest.mark.differs("transformers takes no window then, and fails")
def test_a_max_audio_len_below_30_s_is_one_window(checkpoint):
    change(checkpoint / "processor_config.json", max_audio_len=10)

    assert seconds_heard(checkpoint) == 30


def test_without_max_audio_len_600_s_are_heard(checkpoint):
    change(checkpoint / "processor_config.json", max_audio_len=...)

    assert seconds_heard(checkpoint, 620) == 600


def test_the_default_system_message_is_that_of_the_chat_template(checkpoint):
    path = checkpoint / "chat_template.jinja"
    path.write_text(path.read_text().replace("You are a helpful assistant.", "Be brief."))

    processor = AudioFlamingo3Processor.from_pretrained(checkpoint)

    text = processor.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n")


def test_the_original_layout_has_its_generation_config_in_llm(original_checkpoint):
    change(original_checkpoint / "llm" / "generation_config.json", max_new_tokens=3)

    _, options = load_weights.read_configs(original_checkpoint)

    assert options["max_new_tokens"] == 3


@pytest.mark.differs("transformers reads only the layout of the hub")
def test_the_original_layout_has_its_tokenizer_in_llm(original_checkpoint, processor, sound):
    original = AudioFlamingo3Processor.from_pretrained(original_checkpoint)

    ids = original("Hi", sound(80_000))["input_ids"]

    assert torch.equal(ids, processor("Hi", sound(80_000))["input_ids"])


def test_without_files_of_a_processor_its_settings_are_these(original_checkpoint):
    assert load_weights.read_processor_config(original_checkpoint, {}) == {
        "max_audio_len": 600,
        "system_message": "You are a helpful assistant.",
    }


def test_the_default_transcription_prompt_may_be_in_processor_config_json(checkpoint):
    path = checkpoint / "processor_config.json"
    for prompt, asked in [("Write it.", "Write it."), (..., "Transcribe the input speech.")]:
        change(path, default_transcription_prompt=prompt)
        processor = AudioFlamingo3Processor.from_pretrained(checkpoint)

        batch = processor.apply_transcription_request(np.zeros(400, dtype=np.float32))

        assert f"<sound>{asked}<|im_end|>" in processor.decode(batch["input_ids"][0])


def test_other_log_mel_features_are_refused_by_name(checkpoint):
    for key, (value, other) in FEATURES.items():
        message = f"processor_config.json: {key} is {other}; this model's is {value}"
        change(checkpoint / "processor_config.json", feature_extractor={key: other})
        with pytest.raises(ValueError, match=message):
            load_weights.read_processor_config(checkpoint, {})

        change(checkpoint / "processor_config.json", feature_extractor=None)
        change(checkpoint / "preprocessor_config.json", **{key: other})
        with pytest.raises(ValueError, match="pre" + message):
            load_weights.read_processor_config(checkpoint, {})
        (checkpoint / "preprocessor_config.json").unlink()


def test_a_saved_processor_makes_the_same_tensors(processor, checkpoint, sound):
    processor.save_pretrained(checkpoint)

    again = AudioFlamingo3Processor.from_pretrained(checkpoint)

    batch = again("Hi", sound(16_080))
    for name, tensor in processor("Hi", sound(16_080)).items():
        assert torch.equal(batch[name], tensor)


# ---- The hub's cache ----


def put_in_cache(cache, checkpoint):
    """Makes a checkpoint the newest snapshot of nvidia/some-model in a cache of the hub."""
    model = cache / "models--nvidia--some-model"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("0123abc")
    (model / "snapshots").mkdir()
    (model / "snapshots" / "0123abc").symlink_to(checkpoint)


@pytest.mark.differs("transformers reads the variables once, when it is imported")
def test_a_name_is_looked_up_in_hf_hub_cache_then_hf_home_then_the_home_directory(
    checkpoint, tmp_path, monkeypatch
):
    places = {"HF_HUB_CACHE": "a", "HF_HOME": "b/hub", "HOME": "c/.cache/huggingface/hub"}
    for variable, place in places.items():
        put_in_cache(tmp_path / place, checkpoint)
        monkeypatch.setenv(variable, str(tmp_path / place[0]))
    for variable, place in places.items():
        processor = AudioFlamingo3Processor.from_pretrained("nvidia/some-model")
        assert str(processor.tokenizer.folder).startswith(str(tmp_path / place))
        monkeypatch.delenv(variable)
