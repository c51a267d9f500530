"""Audio and text to tensors and back: log-mel, ids, chat template, batches, input validation."""

import json
import unicodedata
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from checkpoints import change_json, read_json
from places import DATA, TINY
from plumbing.audio_file import load_audio
from processor import (
    HOP_LENGTH,
    N_FFT,
    N_SAMPLES,
    AudioFlamingo3Processor,
    Tokenizer,
    log_mel,
    mel_filters,
    mel_frame_count,
)
from signals import CASES, conversation, sound, write_wav

GOLDENS = json.loads((DATA / "goldens.json").read_text())
SYSTEM_TURN = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def decode_row(processor, batch, row=0):
    """The text of a prompt, special tokens included, without padding."""
    is_real = batch["attention_mask"][row].bool()
    return processor.decode(batch["input_ids"][row][is_real])


def count_id(batch, token_id):
    return int((batch["input_ids"] == token_id).sum())


# ---- Log-mel ----


@pytest.mark.parametrize("case", CASES)
def test_log_mel_and_its_mask_are_those_of_transformers(processor, goldens, case):
    batch = processor.apply_chat_template([conversation(sound(n)) for n in CASES[case]])
    features = batch["input_features"]
    assert features.shape[1:] == (128, 3000)
    assert features.dtype == torch.float32
    assert (features[:, ::8, ::37] - goldens[f"{case}.left.mel"]).abs().max() < 1e-4
    mel_frames = batch["feature_attention_mask"].sum(-1)
    assert torch.equal(mel_frames, goldens[f"{case}.left.mel_frames"])


def plain_log_mel(window):
    """Whisper's log-mel of 30 s of samples and zeros, without the shortcut for short clips."""
    padded = F.pad(window, (0, N_SAMPLES - len(window)))
    hann = torch.hann_window(N_FFT)
    spectrum = torch.stft(padded, N_FFT, HOP_LENGTH, window=hann, return_complex=True)
    power = spectrum[:, :-1].abs().square()
    log = (mel_filters() @ power).clamp(min=1e-10).log10()
    log = log.maximum(log.max() - 8)
    return (log + 4) / 4


@pytest.mark.parametrize(
    "samples", [321, 16000, 16080, 80000, 479500, 479799, 479800, 479999, 480000]
)
def test_the_log_mel_of_a_short_clip_is_that_of_the_clip_padded_to_30_s(samples):
    window = torch.from_numpy(sound(samples))
    assert (log_mel(window) - plain_log_mel(window)).abs().max() < 1e-5


def test_the_spectrum_of_a_short_clip_is_not_computed_for_30_s(monkeypatch):
    lengths = []
    stft = torch.stft

    def noting_stft(samples, *arguments, **options):
        lengths.append(len(samples))
        return stft(samples, *arguments, **options)

    monkeypatch.setattr(torch, "stft", noting_stft)
    log_mel(torch.zeros(16000))
    log_mel(torch.zeros(N_SAMPLES))
    assert lengths == [103 * HOP_LENGTH, N_SAMPLES]


@pytest.mark.parametrize(
    "waveform",
    [torch.zeros(16000), torch.ones(16000), torch.eye(1, 16000)[0], torch.full((16000,), 1e-40)],
)
def test_an_odd_waveform_gives_a_finite_log_mel(waveform):
    assert log_mel(waveform).isfinite().all()


@pytest.mark.parametrize("samples, mel_frames", [(1, 1), (160, 1), (161, 2), (480000, 3000)])
def test_an_incomplete_last_mel_frame_counts(samples, mel_frames):
    assert mel_frame_count(samples) == mel_frames


# ---- Tokenizer ----


@pytest.mark.parametrize("text, ids", GOLDENS["tiny"].items())
def test_ids_are_those_of_transformers(text, ids):
    assert Tokenizer(TINY).encode(text) == ids


def test_ids_of_the_official_tokenizer_are_those_of_transformers(qwen):
    tokenizer = Tokenizer(qwen)
    for text, ids in GOLDENS["qwen"].items():
        assert tokenizer.encode(text) == ids
    assert tokenizer.added_tokens["<sound>"] == 151669
    assert tokenizer.eos_token_id == 151645
    assert tokenizer.pad_token_id == 151671


def test_neighboring_texts_are_encoded_as_one(qwen):
    assert Tokenizer(qwen).encode_pieces(["user\n", "\nhi"])[-2] == 271  # "\n\n", not two "\n"


CHARACTERS = [
    range(32, 127),
    range(0xA0, 0x500),
    range(0x4E00, 0x5000),
    range(0x1F300, 0x1F600),
    range(0x300, 0x340),
    range(9, 14),
]


def test_decoding_encoded_text_gives_the_text_in_nfc(processor):
    rng = np.random.default_rng(0)
    for _ in range(300):
        characters = []
        for _ in range(rng.integers(1, 40)):
            characters.append(chr(rng.choice(CHARACTERS[rng.integers(len(CHARACTERS))])))
        text = "".join(characters)
        ids = processor.tokenizer.encode(text)
        assert processor.tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


def test_only_the_added_tokens_marked_special_are_skipped(processor):
    text = "<|im_start|>hi<tool_call><|fim_prefix|><sound>"
    ids = processor.tokenizer.encode_pieces(processor.tokenizer.split_added_tokens(text))
    assert processor.decode(ids) == text
    assert processor.decode(ids, skip_special_tokens=True) == "hi<tool_call><|fim_prefix|>"


@pytest.mark.parametrize("text", [" " * 10**6, "\n" * 10**6, "a" + "\t" * 10**5])
def test_a_hundred_thousand_spaces_in_a_row_are_refused(processor, text):
    with pytest.raises(ValueError, match="in a row are more than the tokenizer can split"):
        processor(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a" * 10**6,
        "ab c\n" * 2 * 10**5,
        "\0",
        "\ud800",
        "\u202e\u200f",
        "<sound>" * 10**4,
        "<|im_end|><|im_start|>",
    ],
)
def test_any_other_text_is_a_prompt(processor, text):
    assert processor(text)["input_ids"].shape[1] > 10


# ---- Decoding ----


@pytest.mark.parametrize(
    "text, stripped",
    [
        ('The spoken content of the audio is "seven three one".', "seven three one"),
        ("The transcription of the audio is 'it's'.", "it's"),
        ("The content of the input audio is rain.", "rain"),
        ('"Rain."', '"Rain."'),
        ("Rain.", "Rain."),
    ],
)
def test_strip_prefix_keeps_the_transcription_and_other_text_unchanged(processor, text, stripped):
    ids = processor.tokenizer.encode(text)
    assert processor.batch_decode([ids], strip_prefix=True) == [stripped]


def test_a_long_run_of_spaces_after_the_prefix_is_stripped_without_backtracking(processor):
    spaces = " " * 3000
    ids = processor.tokenizer.encode(f"The transcription of the audio is '{spaces}x{spaces}y")
    assert processor.decode(ids, strip_prefix=True).startswith("'")


def test_streamed_text_waits_for_the_last_byte_of_a_character(processor):
    ids = processor.tokenizer.encode("naïve 漢字 🙂!")
    steps = [torch.tensor([token_id, 0]) for token_id in ids]
    parts = list(processor.stream_text(steps))
    assert "".join(parts) == "naïve 漢字 🙂!"
    assert not any("\ufffd" in part for part in parts)


def test_an_incomplete_character_at_the_end_of_a_stream_is_marked(processor):
    ids = processor.tokenizer.encode("naïve 漢字 🙂!")[:-2]
    parts = list(processor.stream_text([torch.tensor([token_id]) for token_id in ids]))
    assert "".join(parts) == processor.decode(ids)
    assert parts[-1] == "\ufffd"


# ---- One prompt, one recording ----


def test_a_prompt_becomes_a_user_turn_with_its_audio_in_front(processor):
    batch = processor("What sound is this?", sound(1600))
    user_turn = "<|im_start|>user\n<sound><sound>What sound is this?<|im_end|>\n"
    assert decode_row(processor, batch) == SYSTEM_TURN + user_turn + "<|im_start|>assistant\n"


def test_audio_placed_by_hand_stays_in_its_place(processor):
    batch = processor("<sound>\nWhat <sound>now?", sound(480321))
    expected = "user\n" + "<sound>" * 750 + "\nWhat <sound>now?"
    assert expected in decode_row(processor, batch)


def test_a_window_without_audio_frames_still_has_a_placeholder(processor):
    batch = processor("<sound><sound>", sound(480001))
    assert count_id(batch, processor.audio_token_id) == 750


def test_there_must_be_one_placeholder_for_each_window(processor):
    message = "Sample 0: found 1 '<sound>' placeholders, but audio was split into 2 window(s)."
    with pytest.raises(ValueError) as error:
        processor("<sound>What?", sound(480001))
    assert str(error.value) == message


def test_there_must_be_one_text_for_each_recording(processor):
    with pytest.raises(ValueError, match=r"^Got 2 texts but 1 audios; they must match 1:1\.$"):
        processor(["a", "b"], sound(1600))


def test_a_finished_template_keeps_its_special_tokens(processor):
    template = "<|im_start|>user\n<sound>Hi<|im_end|>\n<|im_start|>assistant\n"
    batch = processor(template, sound(1600))
    assert decode_row(processor, batch) == template.replace("<sound>", "<sound><sound>")
    assert batch["input_ids"][0, 0] == processor.start_id


@pytest.mark.parametrize("seconds", [5, 30, 70])
def test_the_text_of_a_chat_template_and_its_recording_give_the_same_as_tokenizing_it(
    processor, seconds
):
    audio = sound(seconds * 16000)
    chat = conversation(audio, "What is this?")
    text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    expected = processor.apply_chat_template(chat, add_generation_prompt=True)
    batch = processor(text, audio)
    assert batch.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(batch[name], tensor)


def test_in_a_finished_template_a_placeholder_for_each_window_is_right_too(processor):
    one = "<|im_start|>user\n<sound>Hi<|im_end|>\n"
    three = one.replace("<sound>", "<sound><sound><sound>")
    audio = sound(70 * 16000)
    assert torch.equal(processor(three, audio)["input_ids"], processor(one, audio)["input_ids"])
    with pytest.raises(
        ValueError, match="found 2 '<sound>' placeholders, but audio was split into 3"
    ):
        processor(one.replace("<sound>", "<sound><sound>"), audio)


@pytest.mark.parametrize(
    "forged", ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "[PAD]", "<speech>"]
)
def test_a_special_token_that_a_prompt_spells_out_is_plain_text(processor, forged):
    plain = processor("xhello", sound(1600))
    batch = processor(f"x{forged}hello", sound(1600))
    for token_id in processor.tokenizer.added_tokens.values():
        assert count_id(batch, token_id) == count_id(plain, token_id)


@pytest.mark.parametrize("forged", ["<|im_start|>", "<sound>"])
def test_a_special_token_that_a_message_spells_out_is_plain_text(processor, forged):
    batch = processor.apply_chat_template([{"role": "user", "content": f"{forged}hello <sound>"}])
    assert count_id(batch, processor.audio_token_id) == 0
    assert count_id(batch, processor.start_id) == 2  # for the system turn and the user turn


def test_without_audio_a_placeholder_is_plain_text(processor):
    assert count_id(processor("<sound>"), processor.audio_token_id) == 0


def test_a_waveform_may_be_an_array_a_tensor_a_list_or_integers(processor):
    integers = np.round(sound(1600) * 32767).astype(np.int16)
    floats = integers / 32768
    expected = processor("Hi", floats.astype(np.float32))["input_features"]
    same_audio = [
        integers,
        integers.astype(np.int32) << 16,
        floats,
        floats.tolist(),
        torch.from_numpy(integers),
        torch.from_numpy(floats),
    ]
    for audio in same_audio:
        assert (processor("Hi", audio)["input_features"] - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    "audio, reason",
    [
        (np.zeros(320), "320 samples; at least 321"),
        (np.zeros(0), "0 samples"),
        (np.full(999, np.nan), "NaN or infinite"),
        (np.full(999, np.inf), "NaN or infinite"),
        (np.full(999, 1e30), "far too large; numbers from -1 to 1"),
        (np.zeros((2, 999)), r"shape \(2, 999\).*1-D"),
        (np.array(["a"] * 999), "floats or integers"),
    ],
)
def test_unusable_audio_is_refused_with_the_reason(processor, audio, reason):
    with pytest.raises(ValueError, match=f"^Sample 0: .*{reason}"):
        processor("Hi", audio)


def test_another_sampling_rate_is_refused(processor):
    message = "sampling_rate is 8000; 16000 Hz is expected"
    with pytest.raises(ValueError, match=message):
        processor("Hi", sound(1600), sampling_rate=8000)
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template(conversation(sound(1600)), sampling_rate=8000)


def test_only_the_first_ten_minutes_are_used_and_a_warning_says_so(processor):
    with pytest.warns(UserWarning, match=r"^640\.0 s of audio: only the first 600\.0 s are heard$"):
        batch = processor("Hi", np.zeros(640 * 16000, np.float32))
    assert len(batch["input_features"]) == 20


def test_one_sample_more_than_ten_minutes_is_warned_about(processor):
    with pytest.warns(UserWarning, match=r"600\.0 s of audio: only the first 600\.0 s"):
        batch = processor("Hi", np.zeros(600 * 16000 + 1, np.float32))
    assert len(batch["input_features"]) == 20


def test_ten_minutes_are_used_without_a_warning(processor):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = processor("Hi", np.zeros(600 * 16000, np.float32))
    assert len(batch["input_features"]) == 20


def test_a_file_may_replace_a_waveform(processor, tmp_path):
    path = write_wav(tmp_path / "a.wav", sound(16000))
    expected = processor("Hi", load_audio(path))["input_features"]
    assert torch.equal(processor("Hi", str(path))["input_features"], expected)
    request = processor.apply_transcription_request(path)
    assert torch.equal(request["input_features"], expected)


def test_a_file_that_is_too_short_is_reported(processor, tmp_path):
    path = write_wav(tmp_path / "blip.wav", sound(320))
    with pytest.raises(ValueError, match=r"blip\.wav: .*320 samples; at least 321"):
        processor("Hi", path)


# ---- Batches ----


@pytest.mark.parametrize("run", ["batch.left", "batch.right", "two_windows.left"])
def test_input_ids_and_attention_mask_are_those_of_transformers(processor, goldens, run):
    case, side = run.split(".")
    chats = [conversation(sound(samples)) for samples in CASES[case]]
    batch = processor.apply_chat_template(chats, add_generation_prompt=True, padding_side=side)
    assert torch.equal(batch["input_ids"], goldens[f"{run}.input_ids"])
    is_real = batch["input_ids"] != processor.tokenizer.pad_token_id
    assert torch.equal(batch["attention_mask"], is_real.long())


@pytest.mark.parametrize("samples", [321, 322, 9999, 90001, 479999, 480000, 480001, 480321, 600000])
def test_sound_ids_are_as_many_as_audio_frames(processor, model, samples):
    batch = processor("?", sound(samples))
    frames = model.get_audio_features(batch["input_features"], batch["feature_attention_mask"])
    assert count_id(batch, processor.audio_token_id) == len(frames)


def test_labels_ignore_audio_and_padding(processor):
    batch = processor(["Hi", "What sound is this?"], [sound(1600), sound(3200)], output_labels=True)
    is_audio = batch["input_ids"] == processor.audio_token_id
    is_padding = batch["attention_mask"] == 0
    left_out = is_audio | is_padding
    assert torch.equal(batch["labels"] == -100, left_out)
    assert torch.equal(batch["labels"][~left_out], batch["input_ids"][~left_out])


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


def test_newlines_that_begin_an_answer_are_labeled_with_the_token_that_they_share(qwen):
    processor = AudioFlamingo3Processor(Tokenizer(qwen))
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


def test_an_unknown_kind_of_labels_is_refused(processor):
    with pytest.raises(ValueError, match="output_labels is 'answers'"):
        processor("Hi", output_labels="answers")


def test_to_casts_only_floats(processor):
    batch = processor("Hi", sound(1600)).to("cpu", dtype=torch.bfloat16)
    assert {name: tensor.dtype for name, tensor in batch.items()} == {
        "input_ids": torch.int64,
        "attention_mask": torch.int64,
        "input_features": torch.bfloat16,
        "feature_attention_mask": torch.int64,
    }


def test_to_takes_a_dtype_alone(processor):
    batch = processor("Hi", sound(1600)).to(torch.bfloat16)
    assert batch["input_features"].dtype == torch.bfloat16
    assert batch["input_ids"].dtype == torch.int64


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


@pytest.mark.parametrize("group", ["processor_kwargs", "text_kwargs", "common_kwargs"])
def test_options_may_come_in_the_groups_of_transformers(processor, group):
    chat = conversation(sound(1600), "Hi")
    expected = processor.apply_chat_template(chat, output_labels=True, padding_side="right")
    options = {"output_labels": True, "padding_side": "right", "audio_kwargs": {"padding": True}}
    batch = processor.apply_chat_template(chat, **{group: options})
    assert torch.equal(batch["labels"], expected["labels"])


@pytest.mark.parametrize(
    "options, named",
    [
        ({"processor_kwargs": {"max_length": 5}}, "max_length=5"),
        ({"audio_kwargs": {"sampling_rate": 8000}}, "sampling_rate is 8000"),
        ({"text_kwargs": {"truncation": True}}, "truncation=True"),
        ({"text_kwargs": 5}, "text_kwargs is 5"),
        ({"tools": ["search"]}, r"tools=\['search'\]"),
        ({"continue_final_message": True}, "continue_final_message=True"),
    ],
)
def test_an_option_without_a_meaning_here_is_refused_by_name(processor, options, named):
    with pytest.raises(ValueError, match=named):
        processor.apply_chat_template([{"role": "user", "content": "Hi"}], **options)


def test_options_with_the_only_supported_value_are_accepted_and_others_refused(processor):
    expected = processor("Hi")["input_ids"]
    batch = processor("Hi", return_tensors="pt", padding=True)
    assert torch.equal(batch["input_ids"], expected)
    with pytest.raises(ValueError, match="no option return_tensors='np'"):
        processor("Hi", return_tensors="np")
    with pytest.raises(ValueError, match="no option truncation=True"):
        processor.apply_chat_template([{"role": "user", "content": "Hi"}], truncation=True)


# ---- Conversations ----


def user_message(text, *audios):
    content = [{"type": "text", "text": text}]
    for audio in audios:
        content.append({"type": "audio", "audio": audio})
    return {"role": "user", "content": content}


@pytest.mark.parametrize("golden", GOLDENS["templates"])
def test_the_text_of_a_chat_template_is_that_of_transformers(processor, golden):
    text = processor.apply_chat_template(
        golden["chat"], tokenize=False, add_generation_prompt=golden["prompt"]
    )
    assert text == golden["text"]


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


@pytest.mark.parametrize("key", ["path", "audio", "url"])
def test_the_key_of_a_file_may_be_path_audio_or_url(processor, tmp_path, key):
    path = write_wav(tmp_path / "a.wav", sound(16000))
    message = {"role": "user", "content": [{"type": "audio", key: str(path)}]}
    batch = processor.apply_chat_template([message])
    assert count_id(batch, processor.audio_token_id) == 25


def test_without_tokenizing_no_audio_is_loaded(processor):
    content = [{"type": "audio", "path": "nowhere.wav"}, {"type": "text", "text": "Hi"}]
    chat = [{"role": "user", "content": content}]
    expected = SYSTEM_TURN + "<|im_start|>user\n<sound>Hi<|im_end|>\n"
    assert processor.apply_chat_template([chat, chat], tokenize=False) == [expected, expected]


@pytest.mark.parametrize("conversations", [[], [[]], None, "Hi", 5, {"role": "user"}])
@pytest.mark.parametrize("tokenize", [True, False])
def test_what_is_no_conversation_is_refused(processor, conversations, tokenize):
    with pytest.raises(ValueError, match="conversation"):
        processor.apply_chat_template(conversations, tokenize=tokenize)


@pytest.mark.parametrize("text", [None, 5, [], [None], ["Hi", 5]])
def test_what_is_no_prompt_is_refused(processor, text):
    with pytest.raises(ValueError, match="prompt"):
        processor(text)


def test_the_options_of_a_chat_template_are_keywords(processor):
    with pytest.raises(TypeError):
        processor.apply_chat_template([{"role": "user", "content": "Hi"}], False)


@pytest.mark.parametrize("content", [None, "", []])
def test_a_message_without_content_is_an_empty_turn(processor, content):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]
    text = processor.apply_chat_template(chat, tokenize=False)
    turns = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
    assert text == SYSTEM_TURN + turns


@pytest.mark.parametrize(
    "part", [{"type": "audio"}, {"type": "audio", "path": None}, {"audio": None}]
)
def test_an_audio_part_without_a_recording_is_refused(processor, part):
    with pytest.raises(ValueError, match='an audio part without "path" or "audio"'):
        processor.apply_chat_template([{"role": "user", "content": [part]}])


@pytest.mark.parametrize(
    "content",
    [
        5,
        [5],
        ["hi"],
        [None],
        [{}],
        [{"type": "text"}],
        [{"type": "text", "text": None}],
        [{"type": "text", "text": 619}],  # a number must not become a token
        [{"type": "image", "path": "a.png"}],
    ],
)
def test_a_message_without_text_or_audio_is_refused(processor, content):
    with pytest.raises(ValueError, match="message"):
        processor.apply_chat_template([{"role": "user", "content": content}])


def test_the_error_for_a_part_says_that_it_is_neither_text_nor_audio(processor):
    content = [{"type": "image", "path": "a.png"}]
    with pytest.raises(ValueError, match="neither text nor audio"):
        processor.apply_chat_template([{"role": "user", "content": content}])


def test_a_transcription_request_asks_for_the_transcription(processor):
    prompt = "Transcribe the input speech."
    request = processor.apply_transcription_request([sound(1600), sound(3200)])
    chats = [conversation(sound(1600), prompt), conversation(sound(3200), prompt)]
    expected = processor.apply_chat_template(chats, add_generation_prompt=True)
    assert torch.equal(request["input_ids"], expected["input_ids"])


def test_a_transcription_request_may_have_another_prompt(processor):
    request = processor.apply_transcription_request(sound(1600), "Hi")
    assert "Hi<|im_end|>" in decode_row(processor, request)


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


def test_a_checkpoint_may_have_its_own_transcription_prompt(spoiled):
    change_json(spoiled / "processor_config.json", default_transcription_prompt="Write it down.")
    processor = AudioFlamingo3Processor.from_pretrained(spoiled)
    request = processor.apply_transcription_request(sound(1600))
    assert "Write it down.<|im_end|>" in decode_row(processor, request)


# ---- Decoding ----


def test_rows_of_ids_become_a_list_of_texts(processor):
    ids = torch.tensor([[72, 73], [74, 75]])
    texts = [processor.decode(ids[0]), processor.decode(ids[1])]
    for rows in (ids, ids.numpy(), ids.tolist(), [*ids]):
        assert processor.decode(rows) == processor.batch_decode(rows) == texts


def test_a_single_id_has_a_text(processor):
    assert processor.decode(72) == processor.decode(torch.tensor(72)) == processor.decode([72])


# ---- The files of a processor ----


def test_a_field_of_another_feature_extractor_is_reported(spoiled):
    change_json(spoiled / "processor_config.json", feature_extractor={"hop_length": 200})
    message = r"processor_config\.json: hop_length is 200; this model's is 160"
    with pytest.raises(ValueError, match=message):
        AudioFlamingo3Processor.from_pretrained(spoiled)


@pytest.mark.parametrize(
    "field, value",
    [("dither", 1e-4), ("do_normalize", True), ("padding_side", "left"), ("padding_value", 1.0)],
)
def test_a_field_that_changes_the_features_is_reported(spoiled, field, value):
    extractor = read_json(spoiled / "processor_config.json")["feature_extractor"]
    change_json(spoiled / "processor_config.json", feature_extractor=extractor | {field: value})
    with pytest.raises(ValueError, match=rf"processor_config\.json: {field} is {value}"):
        AudioFlamingo3Processor.from_pretrained(spoiled)


@pytest.mark.parametrize(
    "field, value", [("audio_token", "<audio>"), ("default_transcription_prompt", 5)]
)
def test_a_field_of_another_processor_is_reported(spoiled, field, value):
    change_json(spoiled / "processor_config.json", **{field: value})
    with pytest.raises(ValueError, match=rf"processor_config\.json: {field} is "):
        AudioFlamingo3Processor.from_pretrained(spoiled)


def test_a_flat_preprocessor_config_is_read_too(spoiled):
    (spoiled / "processor_config.json").unlink()
    (spoiled / "preprocessor_config.json").write_text(
        '{"sampling_rate": 16000, "feature_size": 80}'
    )
    message = r"preprocessor_config\.json: feature_size is 80; this model's is 128"
    with pytest.raises(ValueError, match=message):
        AudioFlamingo3Processor.from_pretrained(spoiled)


def test_max_audio_len_is_honored(spoiled):
    change_json(spoiled / "processor_config.json", max_audio_len=60)
    processor = AudioFlamingo3Processor.from_pretrained(spoiled)
    with pytest.warns(UserWarning, match=r"^70\.0 s of audio: only the first 60\.0 s are heard$"):
        batch = processor("Hi", np.zeros(70 * 16000))
    assert len(batch["input_features"]) == 2
