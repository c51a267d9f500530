"""The network: it computes the same numbers as transformers, batch rows are independent, and
invalid input is refused with a clear message."""

import dataclasses
import threading

import pytest
import torch
import torch.nn.functional as F

from af3 import (
    AudioFlamingo3Config,
    AudioFlamingo3EncoderConfig,
    AudioFlamingo3ForConditionalGeneration,
    GenerationConfig,
    Qwen2Config,
    frame_counts,
    next_token,
    penalize_repetition,
    splice,
)
from processor import AudioFlamingo3Processor
from signals import CASES, TEXT, conversation, sound

from_pretrained = AudioFlamingo3ForConditionalGeneration.from_pretrained

# Each case with left padding; those with several rows also with right padding.
GOLDEN_RUNS = []
for case, lengths in CASES.items():
    GOLDEN_RUNS.append(f"{case}.left")
    if len(lengths) > 1:
        GOLDEN_RUNS.append(f"{case}.right")


def run_inputs(processor, run, output_labels=False):
    case, side = run.split(".")
    chats = [conversation(sound(length)) for length in CASES[case]]
    return processor.apply_chat_template(
        chats, add_generation_prompt=True, padding_side=side, output_labels=output_labels
    )


def audio_inputs(batch):
    return batch["input_features"], batch["feature_attention_mask"]


def new_ids(model, batch, **options):
    """What `generate` adds to the prompt."""
    return model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]


def record_inputs(monkeypatch, module):
    """Returns a list to which each call of the module appends its arguments."""
    calls = []
    forward = module.forward

    def recording_forward(*arguments):
        calls.append(arguments)
        return forward(*arguments)

    monkeypatch.setattr(module, "forward", recording_forward)
    return calls


# ---- Configuration ----


def test_the_default_configuration_is_that_of_the_official_model():
    config = AudioFlamingo3Config()
    audio = config.audio_config
    text = config.text_config
    assert (audio.hidden_size, audio.num_hidden_layers, audio.num_attention_heads) == (1280, 32, 20)
    assert (audio.intermediate_size, audio.num_mel_bins) == (5120, 128)
    assert audio.max_source_positions == 1500
    assert (text.hidden_size, text.num_hidden_layers, text.intermediate_size) == (3584, 28, 18944)
    assert (text.num_attention_heads, text.num_key_value_heads, text.head_dim) == (28, 4, 128)
    assert (text.vocab_size, config.audio_token_id) == (151672, 151669)
    assert (text.rope_theta, text.rms_norm_eps) == (1e6, 1e-6)


# ---- Frame counts ----

# (mel frames, conv frames, audio frames)
FRAME_COUNTS = [
    (1, 1, 0),
    (2, 1, 0),
    (3, 2, 1),
    (100, 50, 25),
    (101, 51, 25),
    (500, 250, 125),
    (3000, 1500, 750),
]


@pytest.mark.parametrize("mel, conv, audio", FRAME_COUNTS)
def test_conv_frames_are_half_the_mel_frames_and_audio_frames_half_of_those(mel, conv, audio):
    assert frame_counts(mel) == (conv, audio)
    assert [int(count) for count in frame_counts(torch.tensor(mel))] == [conv, audio]


# ---- The numbers of transformers ----


@pytest.mark.parametrize("run", GOLDEN_RUNS)
def test_audio_frames_are_those_of_transformers(model, processor, goldens, run):
    frames = model.get_audio_features(*audio_inputs(run_inputs(processor, run)))
    expected = goldens[f"{run}.frames"]
    assert (frames[::13] - expected).abs().max() <= 1e-4 * max(1, expected.abs().max())


@pytest.mark.parametrize("run", GOLDEN_RUNS)
def test_logits_are_those_of_transformers(model, processor, goldens, run):
    batch = run_inputs(processor, run)
    logits = model(**batch).logits[batch["attention_mask"].bool()]
    expected = goldens[f"{run}.logits"]
    assert (logits[::29] - expected).abs().max() <= 1e-3 * max(1, expected.abs().max() / 10)


# With left padding, transformers' loss includes first tokens predicted from padding.
@pytest.mark.parametrize("run", [run for run in GOLDEN_RUNS if run != "batch.left"])
def test_the_loss_is_that_of_transformers(model, processor, goldens, run):
    loss = model(**run_inputs(processor, run, output_labels=True)).loss
    assert abs(loss - goldens[f"{run}.loss"]) <= 1e-4


@pytest.mark.parametrize("case", CASES)
def test_64_greedy_tokens_are_those_of_transformers(model, processor, goldens, case):
    batch = run_inputs(processor, f"{case}.left")
    expected = goldens[f"{case}.left.greedy"]
    assert torch.equal(new_ids(model, batch, max_new_tokens=64), expected)


@pytest.mark.parametrize("case", CASES)
def test_24_tokens_with_a_repetition_penalty_are_those_of_transformers(
    model, processor, goldens, case
):
    batch = run_inputs(processor, f"{case}.left")
    options = {"max_new_tokens": 24, "repetition_penalty": 1.3}
    assert torch.equal(new_ids(model, batch, **options), goldens[f"{case}.left.penalised"])


def test_bfloat16_is_about_as_close_to_float32_as_in_transformers(micro, model, processor, goldens):
    rounded_model = from_pretrained(micro, "cpu", torch.bfloat16)
    batch = run_inputs(processor, "five_seconds.left")
    exact = model(**batch).logits
    rounded = rounded_model(**batch).logits.float()
    distance = (rounded - exact).norm() / exact.norm()
    assert distance <= 1.2 * goldens["five_seconds.bfloat16_distance"]


# ---- Encoder ----


def test_the_encoder_computes_no_further_than_the_longest_window(model, processor, monkeypatch):
    calls = record_inputs(monkeypatch, model.audio_tower.layers[0])
    model.get_audio_features(*audio_inputs(run_inputs(processor, "odd.left")))
    assert [x.shape[1] for x, mask in calls] == [51]


def test_windows_are_encoded_in_order_and_together(model, processor, monkeypatch):
    calls = record_inputs(monkeypatch, model.audio_tower.layers[0])
    model.get_audio_features(*audio_inputs(run_inputs(processor, "batch.left")))
    ((x, mask),) = calls
    assert x.shape[:2] == (4, 1500)
    assert mask.sum(-1)[:, 0, 0].tolist() == [250, 76, 1500, 1]


def test_at_most_eight_windows_are_encoded_at_a_time(model, monkeypatch):
    calls = record_inputs(monkeypatch, model.audio_tower)
    mask = torch.ones(20, 3000, dtype=torch.long)
    model.get_audio_features(torch.zeros(20, 128, 3000), mask)
    assert [len(features) for features, mask in calls] == [8, 8, 4]


def test_an_odd_last_conv_frame_is_a_key_although_the_pool_drops_it(model, processor):
    features, mask = audio_inputs(run_inputs(processor, "odd.left"))
    frames = model.audio_tower(features, mask)
    # Mel frame 101 reaches conv frame 51 and, except through attention, no audio frame before 25.
    louder = features.clone()
    louder[:, :, 100] += 1
    changed_frames = model.audio_tower(louder, mask)
    assert frames.shape[1] == 25
    assert (changed_frames - frames)[:, 0].abs().max() > 0


def test_values_in_padded_mel_frames_change_nothing(model, processor):
    features, mask = audio_inputs(run_inputs(processor, "batch.left"))
    changed = features.clone()
    for window, mel_frames in zip(changed, mask.sum(-1)):
        window[:, mel_frames + 2 :] = 7.0
    frames = model.get_audio_features(features, mask)
    assert torch.equal(model.get_audio_features(changed, mask), frames)


def test_windows_encoded_together_are_encoded_as_if_alone(model, processor):
    waveforms = [sound(samples) for samples in (80000, 80900, 95000)]
    together = model.audio_tower(*audio_inputs(processor(["?"] * 3, waveforms)))
    for row, waveform in enumerate(waveforms):
        alone = model.audio_tower(*audio_inputs(processor("?", waveform)))[0]
        assert (together[row, : len(alone)] - alone).abs().max() < 1e-5


def test_the_encoder_casts_features_to_its_own_dtype(micro, processor):
    model = from_pretrained(micro, "cpu", "bfloat16")
    features, mask = audio_inputs(run_inputs(processor, "five_seconds.left"))
    assert features.dtype == torch.float32
    assert model.get_audio_features(features, mask).dtype == torch.bfloat16


def test_heads_are_counted_from_the_width_of_the_projections(model):
    attention = model.audio_tower.layers[0].self_attn
    half = AudioFlamingo3EncoderConfig(hidden_size=32, num_attention_heads=2)
    shard = type(attention)(half)
    for name in ("q_proj", "k_proj", "v_proj"):  # one of two heads
        setattr(shard, name, torch.nn.Linear(32, 16))
    shard.out_proj = torch.nn.Linear(16, 32)
    assert shard(torch.zeros(1, 5, 32), None).shape == (1, 5, 32)


# ---- Splice ----


def test_each_sound_id_is_replaced_by_one_audio_frame_in_order_and_in_place(model, processor):
    batch = run_inputs(processor, "five_seconds.left")
    frames = model.get_audio_features(*audio_inputs(batch))
    input_ids = batch["input_ids"]
    is_sound = input_ids == model.config.audio_token_id
    embedded = model.language_model.model.embed_tokens(input_ids)
    x = splice(embedded, is_sound, frames)
    assert torch.equal(x[is_sound], frames)
    assert torch.equal(x[~is_sound], embedded[~is_sound])


def test_ids_and_frames_that_disagree_are_refused(model, processor):
    batch = run_inputs(processor, "five_seconds.left")
    batch["feature_attention_mask"][:, 496:] = 0
    message = r"^Audio tokens and features mismatch: tokens=125, frames=124\. "
    with pytest.raises(ValueError, match=message):
        model(**batch)


def test_sound_ids_without_features_are_refused(model, processor):
    batch = run_inputs(processor, "five_seconds.left")
    with pytest.raises(ValueError, match=r"tokens=125, frames=0\. "):
        model.generate(batch["input_ids"], batch["attention_mask"])


def test_a_generated_sound_id_is_an_ordinary_token(model):
    cache = model.new_cache(rows=1, capacity=8)
    model.prefill(torch.tensor([[1, 2, 3]]), torch.ones(1, 3, dtype=torch.bool), cache=cache)
    logits = model.decode_one_token(torch.tensor([model.config.audio_token_id]), cache)
    assert logits.shape == (1, model.config.text_config.vocab_size)
    assert logits.isfinite().all()


# ---- Rows of a batch ----


def test_left_and_right_padding_give_the_same_logits_and_loss(model, processor):
    left = run_inputs(processor, "batch.left", output_labels=True)
    right = run_inputs(processor, "batch.right", output_labels=True)
    left_output = model(**left)
    right_output = model(**right)
    left_logits = left_output.logits[left["attention_mask"].bool()]
    right_logits = right_output.logits[right["attention_mask"].bool()]
    assert (left_logits - right_logits).abs().max() < 1e-4
    assert abs(left_output.loss - right_output.loss) < 1e-5


def test_the_ids_in_padding_change_nothing(model, processor):
    batch = run_inputs(processor, "batch.left")
    is_real = batch["attention_mask"].bool()
    logits = model(**batch).logits[is_real]
    batch["input_ids"] = batch["input_ids"].masked_fill(~is_real, 5)
    assert torch.equal(model(**batch).logits[is_real], logits)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}])
def test_greedy_tokens_of_a_row_are_the_same_alone_and_in_a_batch(model, processor, side, options):
    texts = ["What?", TEXT, "Is it loud or " * 9]
    waveforms = [sound(samples, seed=samples) for samples in (480321, 9000, 80000)]
    batch = processor(texts, waveforms, padding_side=side)
    together = new_ids(model, batch, max_new_tokens=24, **options)
    for row, (text, waveform) in enumerate(zip(texts, waveforms)):
        alone = new_ids(model, processor(text, waveform), max_new_tokens=24, **options)
        assert torch.equal(together[row], alone[0])


def test_an_attention_mask_of_another_shape_is_refused(model, processor):
    batch = processor("Hi", sound(4000))
    batch["attention_mask"] = torch.ones(1, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="^attention_mask must have the shape of input_ids"):
        model.generate(**batch)


def test_a_row_of_nothing_but_padding_is_refused(model):
    input_ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with pytest.raises(ValueError, match="^attention_mask must have"):
        model(input_ids, torch.tensor([[1, 1, 1], [0, 0, 0]]))


def test_a_masked_token_in_the_middle_has_no_effect(model):
    mask = torch.tensor([[True, False, True, True]])
    logits = model(torch.tensor([[1, 9, 2, 3]]), mask).logits
    expected = model(torch.tensor([[1, 2, 3]])).logits
    assert (logits[:, [0, 2, 3]] - expected).abs().max() < 1e-5


def test_text_without_audio_is_answered(model, processor):
    batch = processor("Hello!")
    assert "input_features" not in batch
    assert new_ids(model, batch, max_new_tokens=3).shape == (1, 3)


@pytest.mark.parametrize("rows", [1, 2])
def test_no_allocation_grows_with_the_square_of_the_length(model, rows):
    tokens = 4000
    input_ids = torch.randint(100, (rows, tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(input_ids)
    if rows == 2:
        mask[1, :100] = 0
    with torch.profiler.profile(profile_memory=True) as profile:
        list(model.stream(input_ids, mask, max_new_tokens=2, eos_token_id=[]))
    largest = max(event.self_cpu_memory_usage for event in profile.events())  # bytes
    assert largest < tokens * tokens


# ---- Loss ----


def test_labels_of_minus_100_are_ignored(model, processor):
    batch = run_inputs(processor, "five_seconds.left", output_labels=True)
    batch["labels"][:, :-3] = -100
    output = model(**batch)
    expected = F.cross_entropy(output.logits[0, -4:-1], batch["input_ids"][0, -3:])
    assert abs(output.loss - expected) < 1e-5


def test_the_loss_trains_every_parameter(micro, processor):
    model = from_pretrained(micro, "cpu").train()
    model(**run_inputs(processor, "batch.right", output_labels=True)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


# ---- Prefill, decode, generate ----


def test_a_prompt_in_two_parts_gives_the_logits_of_the_prompt_in_one(model, processor):
    batch = run_inputs(processor, "five_seconds.left")
    expected = model(**batch).logits[:, -1]
    cache = model.new_cache(rows=1, capacity=200)
    first_part = batch["input_ids"][:, :-9]
    second_part = batch["input_ids"][:, -9:]
    first_mask = torch.ones_like(first_part, dtype=torch.bool)
    second_mask = torch.ones_like(second_part, dtype=torch.bool)
    features, feature_mask = audio_inputs(batch)
    audio = {"input_features": features, "feature_attention_mask": feature_mask}
    model.prefill(first_part, first_mask, cache, **audio)
    x = model.prefill(second_part, second_mask, cache=cache)
    logits = model.language_model.lm_head(x[:, -1])
    assert (logits - expected).abs().max() < 1e-4


def test_audio_is_encoded_on_the_first_step_only(model, processor, monkeypatch):
    calls = record_inputs(monkeypatch, model.audio_tower)
    model.generate(**run_inputs(processor, "five_seconds.left"), max_new_tokens=5)
    assert len(calls) == 1


def test_lm_head_computes_one_position_a_step(model, processor, monkeypatch):
    calls = record_inputs(monkeypatch, model.language_model.lm_head)
    model.generate(**run_inputs(processor, "batch.left"), max_new_tokens=3)
    hidden_size = model.config.text_config.hidden_size
    assert [x.shape for (x,) in calls] == [(3, hidden_size)] * 3


def test_a_row_ends_at_its_own_end_id_and_is_then_padded(model, processor, goldens):
    batch = run_inputs(processor, "batch.left")
    without_end = goldens["batch.left.greedy"]
    end_id = int(without_end[0, 2])
    options = {"max_new_tokens": 64, "eos_token_id": [end_id], "pad_token_id": 9}
    with_end = new_ids(model, batch, **options)
    for row, expected in zip(with_end.tolist(), without_end.tolist()):
        length = len(row)
        if end_id in expected:
            length = expected.index(end_id) + 1
        assert row[:length] == expected[:length]
        assert set(row[length:]) <= {9}


def test_generation_stops_when_every_row_has_ended(model, processor, goldens):
    batch = run_inputs(processor, "five_seconds.left")
    end_id = int(goldens["five_seconds.left.greedy"][0, 1])
    assert new_ids(model, batch, eos_token_id=end_id).shape[1] <= 2


def test_an_empty_list_of_end_ids_never_stops_early(model, processor, goldens, monkeypatch):
    batch = run_inputs(processor, "five_seconds.left")
    first_id = int(goldens["five_seconds.left.greedy"][0, 0])
    config = dataclasses.replace(model.generation_config, eos_token_id=[first_id])
    monkeypatch.setattr(model, "generation_config", config)
    assert new_ids(model, batch, max_new_tokens=7).shape[1] == 1
    assert new_ids(model, batch, max_new_tokens=7, eos_token_id=[]).shape[1] == 7


def test_stream_gives_the_tokens_of_generate_one_by_one(model, processor, goldens):
    steps = list(model.stream(**run_inputs(processor, "batch.left"), max_new_tokens=4))
    assert torch.equal(torch.stack(steps, dim=1), goldens["batch.left.greedy"][:, :4])


def test_past_ids_are_penalized_as_repetitions(model, processor, goldens):
    batch = run_inputs(processor, "five_seconds.left")
    likeliest = goldens["five_seconds.left.greedy"][:, :1]
    options = {"max_new_tokens": 1, "repetition_penalty": 1e6}
    assert int(likeliest) not in batch["input_ids"]
    assert list(model.stream(**batch, **options)) == [likeliest[0]]
    assert list(model.stream(**batch, **options, past_ids=likeliest)) != [likeliest[0]]


def test_threads_that_share_a_model_get_the_answers_of_one(model, processor, goldens):
    batch = run_inputs(processor, "batch.left")
    answers = []

    def answer():
        answers.append(new_ids(model, batch, max_new_tokens=16))

    threads = [threading.Thread(target=answer) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 4
    for ids in answers:
        assert torch.equal(ids, goldens["batch.left.greedy"][:, :16])


def test_more_tokens_than_positions_are_refused_before_any_work(model, processor, monkeypatch):
    monkeypatch.setattr(model, "prefill", lambda *_, **__: pytest.fail("the prompt was read"))
    batch = run_inputs(processor, "five_seconds.left")
    with pytest.raises(ValueError, match=r"max_new_tokens=4096 .* 4096 positions"):
        model.generate(**batch, max_new_tokens=4096)


def test_a_cache_too_small_for_the_turn_is_refused(model, processor):
    cache = model.new_cache(rows=1, capacity=60)
    batch = processor("One?", sound(20000))
    with pytest.raises(ValueError, match="max_new_tokens=30"):
        list(model.stream(**batch, cache=cache, max_new_tokens=30))


@pytest.mark.parametrize(
    "option, value",
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 2.5),
        ("temperature", 0.0),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_p", 1.5),
        ("repetition_penalty", -1.0),
    ],
)
def test_an_option_out_of_range_is_reported(option, value):
    with pytest.raises(ValueError, match=f"^{option} is "):
        GenerationConfig(do_sample=True, **{option: value})


@pytest.mark.parametrize("option, value", [("temperature", 0.0), ("top_k", -1), ("top_p", 0.0)])
def test_where_nothing_is_sampled_an_option_of_sampling_may_be_any_number(option, value):
    options = GenerationConfig(do_sample=False, **{option: value})
    assert next_token(torch.tensor([[1.0, 3.0, 2.0]]), options).item() == 1


def test_options_of_transformers_that_ask_for_nothing_else_are_taken(model, processor):
    batch = processor("Hi", output_labels=True)
    plain = model.generate(batch["input_ids"], max_new_tokens=4)
    options = {"num_beams": 1, "use_cache": True, "min_p": None, "no_repeat_ngram_size": 0}
    assert torch.equal(model.generate(**batch, max_new_tokens=4, **options), plain)


# ---- Sampling ----


def draw_frequencies(logits, **options):
    """Returns the relative frequency of each id in 4000 draws."""
    torch.manual_seed(0)
    rows = torch.tensor([logits]).expand(4000, -1)
    ids = next_token(rows, GenerationConfig(do_sample=True, **options))
    return torch.bincount(ids, minlength=len(logits)) / len(rows)


def drawn_ids(probabilities, **options):
    logits = torch.tensor(probabilities).log().tolist()
    return draw_frequencies(logits, **options).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampling_follows_the_probabilities_at_its_temperature(temperature):
    logits = [1.0, 0.0, 2.0, -1.0]
    expected = (torch.tensor(logits) / temperature).softmax(0)
    frequencies = draw_frequencies(logits, temperature=temperature)
    assert (frequencies - expected).abs().max() < 0.03


def test_top_k_keeps_the_k_likeliest():
    assert drawn_ids([0.3, 0.1, 0.5, 0.1], top_k=2) == [0, 2]


def test_without_top_k_the_50_likeliest_are_kept_as_in_transformers():
    logits = torch.arange(60) / 100
    assert drawn_ids(logits.exp().tolist()) == list(range(10, 60))
    assert drawn_ids(logits.exp().tolist(), top_k=0) == list(range(60))


def test_a_top_k_of_none_means_no_limit_in_a_call(model, processor, monkeypatch):
    model.generate(**processor("Hi"), max_new_tokens=1)
    seen = []
    monkeypatch.setattr(
        "af3.next_token", lambda logits, options: seen.append(options) or logits.argmax(-1)
    )
    model.generate(**processor("Hi"), max_new_tokens=1, top_k=None)
    assert seen[0].top_k is None


def test_top_p_keeps_the_fewest_tokens_whose_probability_reaches_p():
    probabilities = [0.5, 0.3, 0.15, 0.05]
    assert drawn_ids(probabilities, top_p=0.45) == [0]
    assert drawn_ids(probabilities, top_p=0.7) == [0, 1]


def test_top_p_applies_after_temperature_and_top_k():
    probabilities = [0.4, 0.3, 0.2, 0.1]  # after top-k, the first has 0.4 / 0.7
    assert drawn_ids(probabilities, top_k=2, top_p=0.55) == [0]
    assert drawn_ids(probabilities, top_k=2, top_p=0.55, temperature=5.0) == [0, 1]


def test_the_repetition_penalty_lowers_the_logits_of_seen_ids():
    seen_ids = torch.tensor([[0]])
    options = GenerationConfig()
    positive = torch.tensor([[2.0, 1.9, -1.0]])  # divided by 1.3
    negative = torch.tensor([[-1.0, -1.2, -9.0]])  # multiplied by 1.3
    assert next_token(positive, options).item() == 0
    assert next_token(penalize_repetition(positive, seen_ids, 1.3), options).item() == 1
    assert next_token(penalize_repetition(negative, seen_ids, 1.3), options).item() == 1


# ---- The published examples ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_published_chat_example_runs(micro, processor, dtype):
    model = from_pretrained(micro, device_map="auto", dtype=dtype).eval()
    conversations = [
        conversation(sound(40000), "Transcribe the input speech."),
        conversation(sound(500000), "Describe the song."),
    ]
    batch = processor.apply_chat_template(
        conversations,
        tokenize=True,
        add_generation_prompt=True,
        sampling_rate=getattr(processor.feature_extractor, "sampling_rate", 16000),
        return_dict=True,
    ).to(model.device)
    gen_ids = model.generate(**batch, max_new_tokens=5)
    new_tokens = gen_ids[:, batch["input_ids"].shape[1] :]
    texts = processor.batch_decode(
        new_tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    assert len(texts) == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_published_processor_example_runs(micro, processor, dtype):
    model = from_pretrained(micro, device_map="auto", dtype=dtype).eval()
    inputs = processor(
        ["Transcribe the input speech.", "<sound><sound>\nDescribe the ambience."],
        [sound(40000), sound(500000)],
        padding_side="left",
        tensor_type="pt",
    ).to(model.device)
    ids = model.generate(**inputs, max_new_tokens=5)
    texts = processor.batch_decode(ids, skip_special_tokens=True)
    answers = [text.split("\nassistant\n")[-1] for text in texts]
    assert len(answers) == 2
    assert "ambience" not in answers[1]


def test_the_feature_mask_may_have_its_name_in_transformers(model, processor):
    batch = processor("Hi", sound(4000))
    expected = new_ids(model, batch, max_new_tokens=4)
    logits = model(**batch).logits
    batch["input_features_mask"] = batch.pop("feature_attention_mask")
    assert torch.equal(new_ids(model, batch, max_new_tokens=4), expected)
    assert torch.equal(model(**batch).logits, logits)


def test_features_without_their_mask_are_refused(model, processor):
    batch = processor("Hi", sound(4000))
    del batch["feature_attention_mask"]
    with pytest.raises(ValueError, match="input_features and feature_attention_mask are expected"):
        model(**batch)


@pytest.mark.parametrize(
    "options", [{"output_labels": True}, {"processor_kwargs": {"output_labels": True}}]
)
def test_the_published_training_example_runs(micro, processor, options):
    model = from_pretrained(micro, device_map="cpu")
    model.train()
    chat = conversation(sound(9000), "What sound is this?")
    batch = processor.apply_chat_template(
        [chat], tokenize=True, add_generation_prompt=True, return_dict=True, **options
    ).to(model.device)
    loss = model(**batch).loss
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_options_of_loading_that_change_nothing_are_taken(micro, model):
    options = {"attn_implementation": "sdpa", "trust_remote_code": True, "low_cpu_mem_usage": True}
    loaded = from_pretrained(micro, device_map="cpu", **options)
    assert loaded.config == model.config
    assert AudioFlamingo3Processor.from_pretrained(micro, trust_remote_code=True)


@pytest.mark.parametrize("load", [from_pretrained, AudioFlamingo3Processor.from_pretrained])
@pytest.mark.parametrize(
    "option, value",
    [("attn_implementation", "flash_attention_2"), ("revision", "v2"), ("load_in_8bit", True)],
)
def test_other_options_of_loading_are_refused_by_name(micro, load, option, value):
    with pytest.raises(ValueError, match=f"no option {option}="):
        load(micro, **{option: value})


def test_an_unknown_option_is_refused_with_the_known_ones(model, processor):
    message = r"generate\(\) has no option 'num_beams'; it has max_new_tokens, do_sample"
    with pytest.raises(ValueError, match=message):
        model.generate(**processor("Hi"), num_beams=4)


def test_torch_dtype_is_another_name_for_dtype(micro):
    assert from_pretrained(micro, "cpu", torch_dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_decoder_with_other_head_counts_is_built_from_its_configuration():
    text_config = Qwen2Config(
        vocab_size=9,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=1,
        intermediate_size=8,
    )
    audio_config = AudioFlamingo3EncoderConfig(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=1, intermediate_size=8
    )
    config = AudioFlamingo3Config(audio_config, text_config, audio_token_id=8)
    model = AudioFlamingo3ForConditionalGeneration(config)
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 9)
