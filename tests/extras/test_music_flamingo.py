"""Music Flamingo and Audio Flamingo Next: the numbers of transformers, or the correct ones where
transformers is wrong."""

import math
import shutil

import numpy as np
import pytest
import torch

from af3 import (
    AudioFlamingo3Config,
    AudioFlamingo3EncoderConfig,
    AudioFlamingo3ForConditionalGeneration,
    MusicFlamingoForConditionalGeneration,
)
from checkpoints import SYSTEM_MESSAGES, change_json
from extras.chat import Conversation
from extras.music_flamingo import RotaryTimeConfig, RotaryTimeEmbedding
from load_weights import read_config
from places import DATA
from plumbing.json_file import from_known_keys
from plumbing.tokenizer_files import read_token_ids
from processor import AudioFlamingo3Processor, MusicFlamingoProcessor
from signals import CHAT, MUSIC_CASES, conversation, sound, write_wav

from_pretrained = AudioFlamingo3ForConditionalGeneration.from_pretrained

RUNS = [f"{case}.{side}" for case in MUSIC_CASES for side in ("left", "right")]
LEFT_RUNS = [f"{case}.left" for case in MUSIC_CASES]
RIGHT_RUNS = [f"{case}.right" for case in MUSIC_CASES]


@pytest.fixture(scope="module")
def music_model(music_flamingo):
    return from_pretrained(music_flamingo, device_map="cpu")


@pytest.fixture(scope="module")
def music_processor(music_flamingo):
    return AudioFlamingo3Processor.from_pretrained(music_flamingo)


@pytest.fixture(scope="module")
def music_goldens(music_flamingo):
    """The outputs of transformers, recorded by make_music_goldens.py."""
    goldens = {}
    for name, array in np.load(DATA / "music_goldens.npz").items():
        family, _, name = name.partition(".")
        if family == music_flamingo.name:
            goldens[name] = str(array) if array.dtype.kind == "U" else torch.from_numpy(array)
    return goldens


@pytest.fixture
def changeable(music_flamingo, tmp_path):
    """A copy of a checkpoint that a test may modify."""
    return shutil.copytree(music_flamingo, tmp_path / "checkpoint")


def run_inputs(processor, run, output_labels=False):
    case, side = run.split(".")
    chats = [conversation(sound(length)) for length in MUSIC_CASES[case]]
    return processor.apply_chat_template(
        chats, add_generation_prompt=True, padding_side=side, output_labels=output_labels
    )


def audio_inputs(batch):
    return batch["input_features"], batch["feature_attention_mask"], batch["window_index"]


def new_ids(model, batch, **options):
    return model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]


# ---- The numbers of transformers ----


@pytest.mark.parametrize("run", RUNS)
def test_ids_and_labels_are_those_of_transformers(music_processor, music_goldens, run):
    batch = run_inputs(music_processor, run, output_labels=True)
    assert torch.equal(batch["input_ids"], music_goldens[f"{run}.input_ids"])
    assert torch.equal(batch["labels"], music_goldens[f"{run}.labels"])


@pytest.mark.parametrize("run", RUNS)
def test_audio_frames_are_those_of_transformers(music_model, music_processor, music_goldens, run):
    frames = music_model.get_audio_features(*audio_inputs(run_inputs(music_processor, run)))
    expected = music_goldens[f"{run}.frames"]
    assert (frames[::59] - expected).abs().max() <= 1e-4 * max(1, expected.abs().max())


@pytest.mark.parametrize("run", RUNS)
def test_logits_are_those_of_transformers(music_model, music_processor, music_goldens, run):
    batch = run_inputs(music_processor, run)
    logits = music_model(**batch).logits[batch["attention_mask"].bool()]
    expected = music_goldens[f"{run}.logits"]
    assert (logits[::211] - expected).abs().max() <= 1e-3 * max(1, expected.abs().max() / 10)


@pytest.mark.parametrize("run", RIGHT_RUNS)
def test_the_loss_is_that_of_transformers(music_model, music_processor, music_goldens, run):
    loss = music_model(**run_inputs(music_processor, run, output_labels=True)).loss
    assert abs(loss - music_goldens[f"{run}.loss"]) <= 1e-4


@pytest.mark.parametrize("run", LEFT_RUNS)
def test_greedy_tokens_are_those_of_transformers(music_model, music_processor, music_goldens, run):
    batch = run_inputs(music_processor, run)
    expected = music_goldens[f"{run}.greedy"]
    assert torch.equal(new_ids(music_model, batch, max_new_tokens=64), expected)
    options = {"max_new_tokens": 24, "repetition_penalty": 1.3}
    assert torch.equal(new_ids(music_model, batch, **options), music_goldens[f"{run}.penalised"])


def test_bfloat16_is_about_as_close_to_float32_as_in_transformers(
    music_flamingo, music_model, music_processor, music_goldens
):
    rounded_model = from_pretrained(music_flamingo, "cpu", torch.bfloat16)
    batch = run_inputs(music_processor, "two_windows.left")
    exact = music_model(**batch).logits
    rounded = rounded_model(**batch).logits.float()
    distance = (rounded - exact).norm() / exact.norm()
    assert distance <= 1.2 * music_goldens["bfloat16_distance"]


def test_the_text_of_a_chat_is_that_of_transformers(music_processor, music_goldens):
    text = music_processor.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert text == music_goldens["template"]


# ---- Rotary time ----


def test_the_angles_at_full_width_are_those_of_the_official_model():
    embedding = RotaryTimeEmbedding(RotaryTimeConfig(), AudioFlamingo3EncoderConfig())
    angles = embedding.angles(torch.tensor([0, 1, 2]), audio_frames=750)
    assert angles.shape == (3, 750, 256)
    assert abs(math.cos(angles[1, 10, 0]) - 0.98735851) < 1e-6
    assert abs(math.cos(angles[2, 749, 128]) - 0.31526735) < 1e-6


def test_neighboring_channels_are_rotated_and_the_upper_ones_pass():
    embedding = RotaryTimeEmbedding(RotaryTimeConfig(), AudioFlamingo3EncoderConfig())
    x = torch.randn(1, 20, 1280, generator=torch.Generator().manual_seed(0))
    rotated = embedding(x, torch.tensor([3]))
    assert torch.equal(rotated[..., 512:], x[..., 512:])
    lengths = x[..., :512].unflatten(-1, (-1, 2)).norm(dim=-1)
    assert torch.allclose(rotated[..., :512].unflatten(-1, (-1, 2)).norm(dim=-1), lengths)
    assert not torch.allclose(rotated[..., :512], x[..., :512])


def test_angles_stay_float32_in_a_bfloat16_model(music_flamingo):
    model = from_pretrained(music_flamingo, "cpu", torch.bfloat16)
    assert model.rotary_time.angles(torch.tensor([1]), audio_frames=2).dtype == torch.float32


def test_audio_flamingo_3_has_no_rotary_time(model, processor):
    assert model.rotary_time is None
    assert "window_index" not in processor("Hi", sound(4000))


def test_the_rotary_time_at_the_top_of_config_json_is_not_the_decoders(music_flamingo):
    config = read_config(music_flamingo, read_token_ids(music_flamingo))
    config = from_known_keys(AudioFlamingo3Config, config)
    assert config.rotary_time_config == RotaryTimeConfig(1200, 0.2, 0.01)
    expected = {"music": (1e6, 4096), "next": (15.3e6, 131072)}[music_flamingo.name]
    text = config.text_config
    assert (text.rope_theta, text.max_position_embeddings) == expected
    assert text.head_dim == 12


def test_each_recording_has_its_own_windows(music_processor):
    waveforms = [sound(1000000), sound(9000), sound(480321)]
    batch = music_processor(["a", "b", "c"], waveforms)
    assert batch["window_index"].tolist() == [0, 1, 2, 0, 0, 1]


# transformers derives the windows of a recording from the runs of <sound> ids. That fails here,
# because the last window has one mel frame and no <sound> id.
def test_a_last_window_without_audio_frames_changes_nothing(music_model, music_processor):
    just_over = sound(480160)
    following = sound(560000)
    batch = music_processor(["a", "b"], [just_over, following])
    frames = music_model.get_audio_features(*audio_inputs(batch))
    assert batch["window_index"].tolist() == [0, 1, 0, 1]
    alone = music_processor("a", just_over[:480000])
    assert (frames[:750] - music_model.get_audio_features(*audio_inputs(alone))).abs().max() < 1e-4
    alone = music_processor("b", following)
    assert (frames[750:] - music_model.get_audio_features(*audio_inputs(alone))).abs().max() < 1e-4


def test_several_recordings_in_a_conversation_are_those_of_one_prefill(
    music_model, music_processor
):
    talk = Conversation(music_processor, music_model)
    options = {"max_new_tokens": 5, "eos_token_id": []}
    first_question = talk.question("One?", [sound(9000), sound(500000)])
    first = torch.stack(list(talk.answer(first_question, **options)), dim=1)
    second_question = talk.question("Two?", [sound(700000)])
    second = torch.stack(list(talk.answer(second_question, **options)), dim=1)

    ids = torch.cat([first_question["input_ids"], first[:, :-1], second_question["input_ids"]], 1)
    whole = {"input_ids": ids}
    for name in ("input_features", "feature_attention_mask", "window_index"):
        whole[name] = torch.cat([first_question[name], second_question[name]])
    assert whole["window_index"].tolist() == [0, 0, 1, 0, 1]
    assert torch.equal(new_ids(music_model, whole, **options), second)


def test_features_without_window_index_are_refused(music_model, music_processor):
    batch = music_processor("Hi", sound(4000))
    del batch["window_index"]
    with pytest.raises(ValueError, match="^This model needs window_index"):
        music_model(**batch)


# ---- Words ----


def test_a_recording_is_between_its_borders(music_processor):
    begin_id, end_id = music_processor.borders.ids
    sound_id = music_processor.audio_token_id
    ids = music_processor("Hi", sound(490000))["input_ids"][0].tolist()
    first = ids.index(begin_id)
    last = ids.index(end_id)
    assert ids[first + 1 : last] == [sound_id] * (last - first - 1)
    assert ids.count(sound_id) == last - first - 1 == 750 + 16


def test_windows_placed_by_hand_have_borders_around_them_all(music_processor):
    begin_id, end_id = music_processor.borders.ids
    ids = music_processor("a<sound>b<sound>c", sound(490000))["input_ids"][0].tolist()
    sound_id = music_processor.audio_token_id
    assert ids[ids.index(begin_id) + 1] == sound_id
    assert ids[ids.index(end_id) - 1] == sound_id
    assert (ids.count(begin_id), ids.count(end_id)) == (1, 1)
    assert ids[ids.index(begin_id) + 751] not in (sound_id, end_id)


def test_borders_that_a_user_spells_out_are_text(music_processor):
    begin_id, end_id = music_processor.borders.ids
    ids = music_processor("<|sound_bos|><|sound_eos|>")["input_ids"]
    assert not torch.isin(ids, torch.tensor([begin_id, end_id])).any()


def test_the_system_message_is_that_of_the_checkpoints_template(music_flamingo, music_processor):
    text = music_processor.decode(music_processor("Hi")["input_ids"][0])
    message = SYSTEM_MESSAGES[music_flamingo.name]
    assert text.startswith(f"<|im_start|>system\n{message}<|im_end|>\n")


def test_without_a_template_the_system_message_is_the_usual_one(changeable):
    (changeable / "chat_template.jinja").unlink()
    processor = AudioFlamingo3Processor.from_pretrained(changeable)
    text = processor.decode(processor("Hi")["input_ids"][0])
    assert text.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")


def test_a_system_message_may_be_in_a_string_of_the_template(changeable):
    template = "{{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}"
    (changeable / "chat_template.jinja").write_text(template)
    processor = AudioFlamingo3Processor.from_pretrained(changeable)
    assert processor.system_message == "Be brief."


@pytest.mark.parametrize("template", ["", "<|im_start|>system\n{{ message }}<|im_end|>\n"])
def test_a_template_without_a_system_message_is_refused(changeable, template):
    (changeable / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match="chat_template.jinja: no system message"):
        AudioFlamingo3Processor.from_pretrained(changeable)


def test_the_longest_audio_is_1200_s_unless_the_checkpoint_says_otherwise(changeable):
    processor = AudioFlamingo3Processor.from_pretrained(changeable)
    assert processor.max_samples == 1200 * 16000
    change_json(changeable / "processor_config.json", max_audio_len=1800)
    processor = AudioFlamingo3Processor.from_pretrained(changeable)
    assert processor.max_samples == 1800 * 16000


def test_there_is_no_transcription_prefix_to_strip(music_processor):
    said = "The content of the input audio is 'hi'."
    ids = music_processor.tokenizer.encode(said)
    assert music_processor.decode(ids, strip_prefix=True) == said


def test_a_tokenizer_without_the_borders_is_refused(changeable):
    change_json(changeable / "processor_config.json", audio_bos_token="<|begin|>")
    with pytest.raises(ValueError, match=r"'<\|begin\|>' is not among the added tokens"):
        AudioFlamingo3Processor.from_pretrained(changeable)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"rope_type": "linear"}, "rope_type is 'linear'; only 'default'"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"partial_rotary_factor": 0.7}, "partial_rotary_factor is 0.7"),
        ({"audio_frame_step": "x"}, "audio_frame_step is 'x'"),
    ],
)
def test_a_field_of_another_rotary_time_is_reported(changeable, fields, message):
    path = changeable / "config.json"
    change_json(path, rope_parameters={"rope_type": "default", "rope_theta": 1200.0} | fields)
    with pytest.raises(ValueError, match=message):
        from_pretrained(changeable, "cpu")


# ---- Ways of use ----


def test_the_names_of_transformers_are_aliases():
    assert MusicFlamingoForConditionalGeneration is AudioFlamingo3ForConditionalGeneration
    assert MusicFlamingoProcessor is AudioFlamingo3Processor


@pytest.mark.parametrize(
    "flags", [[], ["--explain"], ["--timestamps"], ["--int8"], ["--batch-size", "2"]]
)
def test_the_command_line_supports_it(run, music_flamingo, tmp_path, flags):
    path = write_wav(tmp_path / "a.wav", sound(490000))
    arguments = [path, "What?", "--max-new-tokens", "3", *flags]
    status, output, errors = run(*arguments, model=music_flamingo)
    assert (status, "error" in errors) == (0, False)
    assert output.strip()


def test_explain_shows_the_rotary_time_as_a_stage(run, music_flamingo, clip):
    _, output, _ = run("--explain", clip, "What?", "--max-new-tokens", 2, model=music_flamingo)
    stages = [line.split("  ")[0] for line in output.split("\n")[:16]]
    assert stages.index("pool, LayerNorm") < stages.index("rotary time") < stages.index("projector")


def test_no_allocation_grows_with_the_square_of_the_windows(music_model, music_processor):
    batch = music_processor("What?", sound(20 * 480000))  # 15,000 audio frames
    with torch.profiler.profile(profile_memory=True) as profile:
        mask = batch["attention_mask"].bool()
        names = ("input_features", "feature_attention_mask", "window_index")
        music_model.prefill(batch["input_ids"], mask, **{name: batch[name] for name in names})
    largest = max(event.self_cpu_memory_usage for event in profile.events())  # bytes
    assert largest < 15000 * 15000


def test_a_saved_model_is_read_again_with_its_rotary_time(music_model, music_flamingo, tmp_path):
    folder = tmp_path / "saved"
    source_config = music_model.source_config
    music_model.source_config = {}  # as in a model that was not loaded from the hub layout
    music_model.save_pretrained(folder)
    music_model.source_config = source_config
    AudioFlamingo3Processor.from_pretrained(music_flamingo).save_pretrained(folder)
    saved = from_pretrained(folder, "cpu")
    processor = AudioFlamingo3Processor.from_pretrained(folder)
    assert saved.config == music_model.config
    batch = processor("Hi", sound(500000))
    assert torch.equal(saved(**batch).logits, music_model(**batch).logits)
