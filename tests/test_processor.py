"""Sound and words: files, resampling, log-mel, windows, ids, templates, and what bad input gets."""

import json
import math
import struct
import subprocess
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import SHARED, TESTS, TINY
from plumbing.audio_file import resample
from processor import AudioFlamingo3Processor, Tokenizer, load_audio, log_mel
from signals import CASES, conversation, sound

GOLDENS = json.loads((TESTS / "goldens.json").read_text())


def wav_bytes(
    samples: np.ndarray, rate: int = 16000, code: int = 1, bits: int = 16, extensible: bool = False
) -> bytes:
    """A WAV file of samples (n, channels) already in the file's own type, or raw bytes for 24 bits."""
    channels, raw = samples.shape[1], samples.tobytes()
    block = channels * bits // 8
    fmt = struct.pack(
        "<HHIIHH", 0xFFFE if extensible else code, channels, rate, rate * block, block, bits
    )
    if extensible:
        fmt += struct.pack("<HHIH", 22, bits, 0, code) + bytes.fromhex(
            "000000001000800000aa00389b71"
        )
    chunks = (
        b"fmt "
        + struct.pack("<I", len(fmt))
        + fmt
        + b"junk\x03\0\0\0abc\0"
        + b"data"
        + struct.pack("<I", len(raw))
        + raw
    )
    return b"RIFF" + struct.pack("<I", len(chunks) + 4) + b"WAVE" + chunks


def tone(hz: float, rate: int, seconds: float = 1.0) -> torch.Tensor:
    return torch.sin(
        2 * math.pi * hz * torch.arange(int(seconds * rate), dtype=torch.float64) / rate
    ).float()


def decibels(x: torch.Tensor) -> float:
    return float(10 * x.square().mean().log10())


# ---- Files ----


def as_file_type(x: np.ndarray, code: int, bits: int) -> np.ndarray:
    if code == 3:
        return x.astype(f"<f{bits // 8}")
    scaled = np.round(x * (2 ** (bits - 1) - 1)).astype("<i4")
    if bits == 8:
        return (scaled + 128).astype("u1")
    return (
        scaled.astype(f"<i{bits // 8}")
        if bits != 24
        else scaled[..., None].view("u1")[..., :3].reshape(len(x), -1)
    )


@pytest.mark.parametrize("extensible", [False, True])
@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("code, bits", [(1, 8), (1, 16), (1, 24), (1, 32), (3, 32), (3, 64)])
def test_every_common_wav_is_read_natively_and_its_channels_averaged(
    tmp_path, monkeypatch, code, bits, channels, extensible
):
    monkeypatch.setenv("PATH", "")  # no ffmpeg
    x = sound(4000)[:, None] * np.linspace(0.2, 1, channels)
    raw = as_file_type(x, code, bits)
    if bits == 24:
        raw = raw.reshape(len(x), channels, 3)
    (tmp_path / "a.wav").write_bytes(wav_bytes(raw, code=code, bits=bits, extensible=extensible))
    assert np.abs(load_audio(tmp_path / "a.wav") - x.mean(1)).max() < 2 ** -(min(bits, 24) - 2)


def test_a_cut_off_wav_is_read_as_far_as_it_goes_with_a_warning(tmp_path):
    whole = wav_bytes(as_file_type(sound(16000)[:, None], 1, 16))
    (tmp_path / "cut.wav").write_bytes(whole[:-16001])
    with pytest.warns(UserWarning, match=r"cut\.wav: cut off, 0\.5 s of 1\.0 s are there"):
        assert len(load_audio(tmp_path / "cut.wav")) == 7999


@pytest.mark.parametrize(
    "content",
    [
        wav_bytes(np.zeros((9, 1), "<i2"), rate=0),
        wav_bytes(np.zeros((0, 1), "<i2")),
        b"RIFF\x04\0\0\0WAVE",
        b"RIFF",
        b"",
        wav_bytes(np.zeros((9, 1), "<i2"))[:50],
        wav_bytes(np.zeros((9, 0), "<i2")),
        wav_bytes(np.zeros((9, 1), "<i2"), rate=1000000),
    ],
)
def test_a_wav_whose_header_lies_or_that_holds_nothing_is_refused_by_name(tmp_path, content):
    (tmp_path / "lies.wav").write_bytes(content)
    with pytest.raises(
        ValueError,
        match=r"lies\.wav: (no samples inside|no audio that ffmpeg can read|not a plain WAV)",
    ):
        load_audio(tmp_path / "lies.wav")


def test_a_missing_file_and_a_directory_are_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.wav: no such file"):
        load_audio(tmp_path / "gone.wav")
    with pytest.raises(ValueError, match="directory"):
        load_audio(tmp_path)


def test_without_ffmpeg_other_containers_are_refused_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    (tmp_path / "a.mp3").write_bytes(b"ID3 something")
    with pytest.raises(ValueError, match=r"a\.mp3: .*ffmpeg.* is not installed"):
        load_audio(tmp_path / "a.mp3")


@pytest.mark.parametrize(
    "ending, codec",
    [
        ("mp3", []),
        ("flac", []),
        ("ogg", []),
        ("m4a", []),
        ("opus", ["-c:a", "libopus"]),
        ("mkv", []),
        ("mp4", []),
        ("wav", ["-c:a", "adpcm_ms"]),
    ],
)
def test_other_containers_go_through_ffmpeg(tmp_path, ffmpeg, ending, codec):
    x = sound(48000)
    (tmp_path / "in.wav").write_bytes(wav_bytes(as_file_type(x[:, None], 1, 16)))
    path = tmp_path / f"an odd 'name', ü.{ending}"
    subprocess.run([ffmpeg, "-v", "error", "-i", tmp_path / "in.wav", *codec, path], check=True)
    decoded = load_audio(path)
    alike = np.fft.irfft(
        np.fft.rfft(decoded, 1 << 17) * np.fft.rfft(x, 1 << 17).conj()
    )  # a codec may delay
    assert alike.max() > 0.9 * np.linalg.norm(x) * np.linalg.norm(decoded)
    assert abs(len(decoded) - 48000) < 3000


def test_a_file_with_no_audio_inside_is_refused_by_name(tmp_path, ffmpeg):
    (tmp_path / "text.mp3").write_text("no sound at all " * 99)
    with pytest.raises(ValueError, match=r"text\.mp3: no audio that ffmpeg can read"):
        load_audio(tmp_path / "text.mp3")


def test_a_playlist_that_points_at_another_file_is_never_followed(tmp_path, ffmpeg):
    (tmp_path / "secret.wav").write_bytes(wav_bytes(np.ones((16000, 1), "<i2")))
    for name, content in [
        ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.wav\n#EXT-X-ENDLIST\n"),
        ("list.mp3", f"ffconcat version 1.0\nfile {tmp_path}/secret.wav\n"),
    ]:
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match="no audio that ffmpeg can read"):
            load_audio(tmp_path / name)


# ---- Resampling ----


@pytest.mark.parametrize("rate", [7919, 8000, 11025, 16000, 22050, 44100, 48000, 96000, 192000])
def test_n_samples_give_ceil_n_times_16000_over_rate(rate):
    for samples in (1, 7, 1000, rate + 1):
        assert len(resample(torch.zeros(samples), rate, 16000)) == -(-samples * 16000 // rate)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 96000])
def test_a_tone_comes_through_without_delay_at_65_decibels_signal_to_noise(rate):
    y, wanted = resample(tone(1000, rate), rate, 16000), tone(1000, 16000)
    assert decibels(wanted[500:-500]) - decibels((y[:16000] - wanted)[500:-500]) >= 65


@pytest.mark.parametrize("rate", [44101, 191999, 767999])
def test_a_rate_nobody_uses_is_met_within_six_millionths(rate):
    y, wanted = resample(tone(1000, rate), rate, 16000), tone(1000, 16000)
    assert len(y) == 16000 and decibels(wanted[500:-500]) - decibels((y - wanted)[500:-500]) >= 30


@pytest.mark.parametrize("rate", [44100, 48000, 96000])
@pytest.mark.parametrize(
    "hz, least, most",
    [
        (3000, -0.1, 0.1),
        (6500, -0.1, 0.1),
        (7000, -0.5, 0.5),
        (9500, -999, -60),
        (10500, -999, -80),
    ],
)
def test_the_filter_is_flat_below_and_silent_above(rate, hz, least, most):
    gain = decibels(resample(tone(hz, rate), rate, 16000)[500:-500]) - decibels(tone(hz, rate))
    assert least <= gain <= most


@pytest.mark.parametrize(
    "rate, samples",
    [(1000, 127), (4000, 127), (8000, 255), (24000, 511), (48000, 1023), (44100, 1000)],
)
def test_a_click_at_the_end_does_not_come_round_to_the_beginning(rate, samples):
    x = torch.zeros(samples)
    x[-1] = 1
    y = resample(x, rate, 16000)
    assert y[:20].abs().max() < 1e-3 * y.abs().max()


def test_what_comes_later_does_not_change_what_came_before():
    x = torch.from_numpy(sound(3 * 48000))
    assert torch.allclose(
        resample(x, 48000, 16000)[:16000], resample(x[:60000], 48000, 16000)[:16000], atol=1e-6
    )


# ---- Log-mel ----


@pytest.mark.parametrize("case", CASES)
def test_log_mel_and_its_mask_are_the_oracles(processor, goldens, case):
    batch = processor.apply_chat_template([conversation(sound(n)) for n in CASES[case]])
    assert (batch["input_features"][:, ::8, ::37] - goldens[f"{case}.left.mel"]).abs().max() < 1e-4
    assert torch.equal(batch["feature_attention_mask"].sum(-1), goldens[f"{case}.left.mel_frames"])
    assert (
        batch["input_features"].shape[1:] == (128, 3000)
        and batch["input_features"].dtype == torch.float32
    )


def test_a_short_clip_is_not_padded_to_thirty_seconds_of_mel():
    assert log_mel(torch.from_numpy(sound(16000))).shape == (128, 3000)
    assert log_mel(torch.from_numpy(sound(480000))).shape == (128, 3000)


@pytest.mark.parametrize(
    "signal",
    [torch.zeros(16000), torch.ones(16000), torch.eye(1, 16000)[0], torch.full((16000,), 1e-40)],
)
def test_odd_signals_give_a_finite_log_mel(signal):
    assert log_mel(signal).isfinite().all()


# ---- Tokenizer ----


@pytest.mark.parametrize("text, ids", GOLDENS["tiny"].items())
def test_ids_are_the_oracles(text, ids):
    assert Tokenizer(TINY).encode(text) == ids


def test_ids_of_the_big_models_tokenizer_are_the_oracles(qwen):
    tokenizer = Tokenizer(qwen)
    assert {text: tokenizer.encode(text) for text in GOLDENS["qwen"]} == GOLDENS["qwen"]
    assert (tokenizer.added_tokens["<sound>"], tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        151669,
        151645,
        151671,
    )
    assert tokenizer.encode_pieces(["user\n", "\nhi"])[-2] == 271


def test_decoding_what_was_encoded_gives_the_text_in_nfc(processor):
    rng = np.random.default_rng(0)
    pools = [
        range(32, 127),
        range(0xA0, 0x500),
        range(0x4E00, 0x5000),
        range(0x1F300, 0x1F600),
        range(0x300, 0x340),
        range(9, 14),
    ]
    for _ in range(300):
        text = "".join(
            chr(rng.choice(pools[rng.integers(len(pools))])) for _ in range(rng.integers(1, 40))
        )
        assert processor.tokenizer.decode(
            processor.tokenizer.encode(text)
        ) == unicodedata.normalize("NFC", text)


def test_only_the_added_tokens_marked_special_are_skipped(processor):
    added = processor.tokenizer.added_tokens
    ids = [
        added["<|im_start|>"],
        *processor.tokenizer.encode("hi"),
        added["<tool_call>"],
        added["<|fim_prefix|>"],
        added["<sound>"],
    ]
    assert processor.decode(ids) == "<|im_start|>hi<tool_call><|fim_prefix|><sound>"
    assert processor.decode(ids, skip_special_tokens=True) == "hi<tool_call><|fim_prefix|>"


@pytest.mark.parametrize(
    "said, kept",
    [
        ('The spoken content of the audio is "seven three one".', "seven three one"),
        ("The transcription of the audio is 'it's'.", "it's"),
        ("The content of the input audio is rain.", "rain"),
        ('"Rain."', '"Rain."'),
        ("Rain.", "Rain."),
    ],
)
def test_strip_prefix_takes_the_transcription_out_of_its_sentence_and_leaves_other_text_alone(
    processor, said, kept
):
    assert processor.batch_decode([processor.tokenizer.encode(said)], strip_prefix=True) == [kept]


def test_streamed_text_waits_for_a_characters_last_byte_and_adds_up_to_the_whole(processor):
    ids = processor.tokenizer.encode("naïve 漢字 🙂!")
    pieces = list(processor.stream_text(torch.tensor([id, 0]) for id in ids))
    assert "".join(pieces) == "naïve 漢字 🙂!" and "\ufffd" not in "".join(pieces)
    cut = list(processor.stream_text(torch.tensor([id]) for id in ids[:-2]))
    assert "".join(cut) == processor.decode(ids[:-2]) and cut[-1] == "\ufffd"


# ---- One prompt, one sound ----


def spelled(processor, batch, row=0):
    return processor.decode(batch["input_ids"][row][batch["attention_mask"][row].bool()])


SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def test_a_prompt_becomes_a_user_turn_with_its_sound_in_front(processor):
    batch = processor("What sound is this?", sound(1600))
    assert (
        spelled(processor, batch)
        == SYSTEM
        + "<|im_start|>user\n"
        + "<sound>" * 2
        + "What sound is this?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_sound_placed_by_hand_stays_in_its_place(processor):
    batch = processor("<sound>\nWhat <sound>now?", sound(480321))
    assert "user\n" + "<sound>" * 750 + "\nWhat <sound>now?" in spelled(processor, batch)


def test_each_window_has_its_own_placeholder_and_a_window_without_frames_too(processor):
    assert spelled(processor, processor("<sound><sound>", sound(480001))).count("<sound>") == 750


def test_placeholders_that_are_not_the_windows_are_refused(processor):
    with pytest.raises(
        ValueError,
        match=r"^Sample 0: found 1 '<sound>' placeholders, but audio was split into 2 window\(s\)\.$",
    ):
        processor("<sound>What?", sound(480001))


def test_texts_and_audios_must_match(processor):
    with pytest.raises(ValueError, match=r"^Got 2 texts but 1 audios; they must match 1:1\.$"):
        processor(["a", "b"], sound(1600))


def test_a_finished_template_keeps_its_special_tokens(processor):
    template = "<|im_start|>user\n<sound>Hi<|im_end|>\n<|im_start|>assistant\n"
    assert spelled(processor, processor(template, sound(1600))) == template.replace(
        "<sound>", "<sound>" * 2
    )
    assert (
        processor(template, sound(1600))["input_ids"][0, 0]
        == processor.tokenizer.added_tokens["<|im_start|>"]
    )


@pytest.mark.parametrize(
    "forged", ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "[PAD]", "<speech>"]
)
def test_a_special_token_that_a_user_spells_out_is_plain_text(processor, forged):
    plain = processor("x" + "hello", sound(1600))["input_ids"]
    batch = processor(f"x{forged}hello", sound(1600))
    chat = processor.apply_chat_template([{"role": "user", "content": f"{forged}hello <sound>"}])
    count = lambda ids, token: int((ids == processor.tokenizer.added_tokens[token]).sum())
    for token in processor.tokenizer.added_tokens:
        assert count(batch["input_ids"], token) == count(plain, token)
    assert (
        count(chat["input_ids"], "<sound>") == 0 and count(chat["input_ids"], "<|im_start|>") == 2
    )


def test_without_audio_a_placeholder_is_plain_text(processor):
    assert (processor("<sound>")["input_ids"] == processor.audio_token_id).sum() == 0


# ---- Batches ----


@pytest.mark.parametrize("run", ["batch.left", "batch.right", "two_windows.left"])
def test_input_ids_are_the_oracles(processor, goldens, run):
    case, side = run.split(".")
    batch = processor.apply_chat_template(
        [conversation(sound(n)) for n in CASES[case]], add_generation_prompt=True, padding_side=side
    )
    assert torch.equal(batch["input_ids"], goldens[f"{run}.input_ids"])
    assert torch.equal(
        batch["attention_mask"], (batch["input_ids"] != processor.tokenizer.pad_token_id).long()
    )


def test_sound_ids_are_as_many_as_audio_frames_for_any_length(processor, model):
    rng = np.random.default_rng(1)
    for samples in [321, 479999, 480000, 480001, 480321, *rng.integers(322, 700000, 5)]:
        batch = processor("?", sound(int(samples)))
        frames = model.get_audio_features(batch["input_features"], batch["feature_attention_mask"])
        assert int((batch["input_ids"] == processor.audio_token_id).sum()) == len(frames)


def test_labels_leave_out_audio_and_padding(processor):
    batch = processor(["Hi", "What sound is this?"], [sound(1600), sound(3200)], output_labels=True)
    hidden = (batch["attention_mask"] == 0) | (batch["input_ids"] == processor.audio_token_id)
    assert torch.equal(batch["labels"] == -100, hidden)
    assert torch.equal(batch["labels"][~hidden], batch["input_ids"][~hidden])


def test_to_casts_only_floats(processor):
    batch = processor("Hi", sound(1600)).to("cpu", dtype=torch.bfloat16)
    assert {name: value.dtype for name, value in batch.items()} == {
        "input_ids": torch.int64,
        "attention_mask": torch.int64,
        "input_features": torch.bfloat16,
        "feature_attention_mask": torch.int64,
    }


def test_a_waveform_may_be_an_array_a_tensor_a_list_or_integers(processor):
    x = np.round(sound(1600) * 32767).astype(np.int16)
    wanted = processor("Hi", x / np.float32(32768))["input_features"]
    for same in (
        x,
        torch.from_numpy(x),
        (x / 32768).tolist(),
        torch.from_numpy(x / 32768),
        x.astype(np.int32) << 16,
    ):
        assert (processor("Hi", same)["input_features"] - wanted).abs().max() < 1e-4


@pytest.mark.parametrize(
    "audio, reason",
    [
        (np.zeros(320), "320 samples; at least 321"),
        (np.zeros(0), "0 samples"),
        ([], "0 samples"),
        (np.full(999, np.nan), "NaN or infinite"),
        (np.full(999, np.inf), "NaN or infinite"),
        (np.full(999, 1e30), "at most 1 in size"),
        (np.zeros((2, 999)), r"shape \(2, 999\).*1-D"),
        (np.array(["a"] * 999), "floats or integers"),
    ],
)
def test_audio_that_cannot_be_heard_is_refused_with_the_reason(processor, audio, reason):
    with pytest.raises(ValueError, match=f"^Sample 0: .*{reason}"):
        processor("Hi", audio)


def test_another_sampling_rate_is_refused(processor):
    for call in (
        lambda: processor("Hi", sound(1600), sampling_rate=8000),
        lambda: processor.apply_chat_template(conversation(sound(1600)), sampling_rate=8000),
    ):
        with pytest.raises(ValueError, match="sampling_rate is 8000; 16000 Hz is expected"):
            call()


def test_only_the_first_ten_minutes_are_heard_and_a_warning_says_so(processor):
    with pytest.warns(UserWarning, match=r"^640\.0 s of audio: only the first 600\.0 s are heard$"):
        batch = processor("Hi", np.zeros(640 * 16000, np.float32))
    assert len(batch["input_features"]) == 20


def test_ten_minutes_are_heard_without_a_warning(processor):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(processor("Hi", np.zeros(600 * 16000, np.float32))["input_features"]) == 20


# ---- Conversations ----


@pytest.mark.parametrize("golden", GOLDENS["templates"])
def test_the_templates_text_is_the_oracles(processor, golden):
    assert (
        processor.apply_chat_template(
            golden["chat"], tokenize=False, add_generation_prompt=golden["prompt"]
        )
        == golden["text"]
    )


def test_several_sounds_stand_in_order_before_their_turns_text(processor):
    turn = lambda text, *audios: {
        "role": "user",
        "content": [
            {"type": "text", "text": text},
            *({"type": "audio", "audio": a} for a in audios),
        ],
    }
    chat = [
        turn("Two", sound(1600), sound(3200)),
        {"role": "assistant", "content": "ok"},
        turn("One", sound(4800)),
    ]
    batch = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert "user\n" + "<sound>" * (2 + 5) + "Two" in spelled(
        processor, batch
    ) and "user\n" + "<sound>" * 7 + "One" in spelled(processor, batch)
    assert batch["feature_attention_mask"].sum(-1).tolist() == [10, 20, 30]


def test_a_file_may_stand_in_for_its_samples(processor, tmp_path):
    (tmp_path / "a.wav").write_bytes(wav_bytes(as_file_type(sound(16000)[:, None], 1, 16)))
    wanted = processor("Hi", load_audio(tmp_path / "a.wav"))["input_features"]
    assert torch.equal(processor("Hi", str(tmp_path / "a.wav"))["input_features"], wanted)
    assert torch.equal(
        processor.apply_transcription_request(tmp_path / "a.wav")["input_features"], wanted
    )


def test_a_file_too_short_to_hear_is_named(processor, tmp_path):
    (tmp_path / "blip.wav").write_bytes(wav_bytes(as_file_type(sound(320)[:, None], 1, 16)))
    with pytest.raises(ValueError, match=r"blip\.wav: .*320 samples; at least 321"):
        processor("Hi", tmp_path / "blip.wav")


def test_a_message_of_none_is_skipped_and_a_part_that_is_neither_refused(processor):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None}]
    assert processor.apply_chat_template(chat, tokenize=False) == processor.apply_chat_template(
        chat[:1], tokenize=False
    )
    with pytest.raises(ValueError, match="neither text nor audio"):
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image", "path": "a.png"}]}]
        )


def test_a_file_may_stand_under_path_or_audio(processor, tmp_path):
    (tmp_path / "a.wav").write_bytes(wav_bytes(as_file_type(sound(16000)[:, None], 1, 16)))
    ids = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "audio", key: str(tmp_path / "a.wav")}]}]
        )["input_ids"]
        for key in ("path", "audio")
    ]
    assert torch.equal(*ids) and (ids[0] == processor.audio_token_id).sum() == 25


def test_without_tokenizing_no_audio_is_loaded(processor):
    chat = [
        {
            "role": "user",
            "content": [{"type": "audio", "path": "nowhere.wav"}, {"type": "text", "text": "Hi"}],
        }
    ]
    assert (
        processor.apply_chat_template([chat, chat], tokenize=False)
        == [SYSTEM + "<|im_start|>user\n<sound>Hi<|im_end|>\n"] * 2
    )


def test_a_transcription_request_asks_for_the_transcription(processor):
    asked = processor.apply_transcription_request([sound(1600), sound(3200)])
    wanted = processor.apply_chat_template(
        [conversation(sound(n), "Transcribe the input speech.") for n in (1600, 3200)],
        add_generation_prompt=True,
    )
    assert torch.equal(asked["input_ids"], wanted["input_ids"])
    assert "Hi<|im_end|>" in spelled(
        processor, processor.apply_transcription_request(sound(1600), "Hi")
    )


# ---- Its files ----


def change(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_feature_extractor_that_is_not_the_models_is_refused_by_field(spoilt):
    change(spoilt / "processor_config.json", feature_extractor={"hop_length": 200})
    with pytest.raises(
        ValueError, match=r"processor_config\.json: hop_length is 200; this model's is 160"
    ):
        AudioFlamingo3Processor.from_pretrained(spoilt)


def test_a_flat_preprocessor_config_is_read_too(spoilt):
    (spoilt / "processor_config.json").unlink()
    (spoilt / "preprocessor_config.json").write_text('{"sampling_rate": 16000, "feature_size": 80}')
    with pytest.raises(
        ValueError, match=r"preprocessor_config\.json: feature_size is 80; this model's is 128"
    ):
        AudioFlamingo3Processor.from_pretrained(spoilt)


@pytest.mark.parametrize("text", [" " * 10**6, "\n" * 10**6, "a" + "\t" * 10**5])
def test_a_hundred_thousand_spaces_in_a_row_are_refused_in_words(processor, text):
    with pytest.raises(ValueError, match="in a row are more than the tokenizer"):
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


@pytest.mark.parametrize(
    "content",
    [
        5,
        [5],
        ["hi"],
        [None],
        [{"type": "text", "text": 619}],
        [{"type": "text", "text": None}],
        [{"type": "text"}],
        [{}],
    ],
)
def test_a_message_of_odd_content_is_refused_and_no_number_becomes_a_token(processor, content):
    with pytest.raises(ValueError, match="message"):
        processor.apply_chat_template([{"role": "user", "content": content}])


def test_a_long_run_of_spaces_in_what_was_said_takes_no_time(processor):
    said = "The transcription of the audio is '" + " " * 3000 + "x" + " " * 3000 + "y"
    assert processor.decode(processor.tokenizer.encode(said), strip_prefix=True).startswith("'")


def test_max_audio_len_is_honoured(spoilt):
    change(spoilt / "processor_config.json", max_audio_len=60)
    with pytest.warns(UserWarning, match=r"^70\.0 s of audio: only the first 60\.0 s are heard$"):
        assert (
            len(
                AudioFlamingo3Processor.from_pretrained(spoilt)("Hi", np.zeros(70 * 16000))[
                    "input_features"
                ]
            )
            == 2
        )


@pytest.mark.skipif(
    not (SHARED / "data" / "jfk.flac").exists(), reason="../shared/data is not here"
)
def test_a_real_recording_keeps_its_length(ffmpeg):
    assert load_audio(SHARED / "data" / "jfk.flac").shape == (176000,)
