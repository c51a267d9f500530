"""The network: every number against the oracle's, every row on its own, every refusal in words."""

import dataclasses
import threading

import pytest
import torch

from af3 import (
    AudioFlamingo3Config,
    AudioFlamingo3EncoderConfig,
    AudioFlamingo3ForConditionalGeneration,
    GenerationConfig,
    KeyValueCache,
    Qwen2Config,
    frame_counts,
    next_token,
)
from signals import CASES, TEXT, conversation, sound

GOLDEN_RUNS = [
    f"{case}.{side}" for case, rows in CASES.items() for side in ("left", "right")[: len(rows)]
]


def run_inputs(processor, run):
    case, side = run.split(".")
    chats = [conversation(sound(length)) for length in CASES[case]]
    return processor.apply_chat_template(
        chats, add_generation_prompt=True, padding_side=side, output_labels=True
    )


def without_labels(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


# ---- Frame arithmetic ----


@pytest.mark.parametrize(
    "mel, conv, audio",
    [
        (1, 1, 0),
        (2, 1, 0),
        (3, 2, 1),
        (100, 50, 25),
        (101, 51, 25),
        (500, 250, 125),
        (3000, 1500, 750),
    ],
)
def test_conv_frames_are_half_the_mel_frames_and_audio_frames_half_of_those(mel, conv, audio):
    assert frame_counts(mel) == (conv, audio)
    assert [int(count) for count in frame_counts(torch.tensor(mel))] == [conv, audio]


# ---- Numbers of the oracle ----


@pytest.mark.parametrize("run", GOLDEN_RUNS)
def test_audio_frames_are_the_oracles(model, processor, goldens, run):
    batch = run_inputs(processor, run)
    frames = model.get_audio_features(batch["input_features"], batch["feature_attention_mask"])
    wanted = goldens[f"{run}.frames"]
    assert (frames[::13] - wanted).abs().max() <= 1e-4 * max(1, wanted.abs().max())


@pytest.mark.parametrize("run", GOLDEN_RUNS)
def test_logits_are_the_oracles(model, processor, goldens, run):
    batch = run_inputs(processor, run)
    logits = model(**batch).logits[batch["attention_mask"].bool()][::29]
    wanted = goldens[f"{run}.logits"]
    assert (logits - wanted).abs().max() <= 1e-3 * max(1, wanted.abs().max() / 10)


@pytest.mark.parametrize("run", [run for run in GOLDEN_RUNS if run != "batch.left"])
def test_the_loss_is_the_oracles(model, processor, goldens, run):
    assert abs(model(**run_inputs(processor, run)).loss - goldens[f"{run}.loss"]) <= 1e-4


@pytest.mark.parametrize(
    "options, key",
    [
        ({"max_new_tokens": 64}, "greedy"),
        ({"max_new_tokens": 24, "repetition_penalty": 1.3}, "penalised"),
    ],
)
@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_are_the_oracles(model, processor, goldens, case, options, key):
    batch = without_labels(run_inputs(processor, f"{case}.left"))
    new = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    assert torch.equal(new, goldens[f"{case}.left.{key}"])


def test_bfloat16_is_about_as_near_to_float32_as_the_oracles(micro, model, processor, goldens):
    rounded = AudioFlamingo3ForConditionalGeneration.from_pretrained(micro, "cpu", torch.bfloat16)
    batch = run_inputs(processor, "five_seconds.left")
    exact, near = model(**batch).logits, rounded(**batch).logits.float()
    assert (near - exact).norm() / exact.norm() <= 1.2 * goldens["five_seconds.bfloat16_distance"]


# ---- Encoder ----


def test_the_encoder_never_computes_past_the_longest_real_window(model, processor):
    batch = run_inputs(processor, "odd.left")
    lengths = []
    hook = model.audio_tower.layers[0].register_forward_pre_hook(
        lambda _, inputs: lengths.append(inputs[0].shape[1])
    )
    model.get_audio_features(batch["input_features"], batch["feature_attention_mask"])
    hook.remove()
    assert lengths == [51]


def test_windows_of_different_lengths_do_not_pay_for_each_other(model, processor):
    batch = run_inputs(processor, "batch.left")
    lengths = []
    hook = model.audio_tower.layers[0].register_forward_pre_hook(
        lambda _, inputs: lengths.append(inputs[0].shape[:2])
    )
    model.get_audio_features(batch["input_features"], batch["feature_attention_mask"])
    hook.remove()
    assert sorted(lengths) == [(1, 1), (1, 76), (1, 250), (1, 1500)]


def test_an_odd_last_conv_frame_is_a_key_though_the_pool_drops_it(model, processor):
    batch = run_inputs(processor, "odd.left")
    whole = model.audio_tower(batch["input_features"], batch["feature_attention_mask"])
    louder = batch["input_features"].clone()
    louder[:, :, 100] += (
        1  # the 101st mel frame reaches conv frame 51 and, but for attention, no audio frame before 25
    )
    assert whole.shape[1] == 25
    assert (model.audio_tower(louder, batch["feature_attention_mask"]) - whole)[
        :, 0
    ].abs().max() > 0


def test_what_stands_in_padded_mel_frames_changes_nothing(model, processor):
    batch = run_inputs(processor, "batch.left")
    spoilt = batch["input_features"].clone()
    for row, real in zip(spoilt, batch["feature_attention_mask"].sum(-1)):
        row[:, real + 2 :] = 7.0
    frames = model.get_audio_features(batch["input_features"], batch["feature_attention_mask"])
    assert torch.equal(model.get_audio_features(spoilt, batch["feature_attention_mask"]), frames)


def test_windows_encoded_together_are_encoded_as_if_alone(model, processor):
    texts, audios = ["?"] * 3, [sound(n) for n in (80000, 80900, 95000)]
    batch = processor(texts, audios)
    together = model.audio_tower(batch["input_features"], batch["feature_attention_mask"])
    for row, audio in enumerate(audios):
        one = processor("?", audio)
        alone = model.audio_tower(one["input_features"], one["feature_attention_mask"])[0]
        assert (together[row, : len(alone)] - alone).abs().max() < 1e-5


def test_the_encoder_casts_features_to_its_own_dtype(micro, processor):
    rounded = AudioFlamingo3ForConditionalGeneration.from_pretrained(micro, "cpu", "bfloat16")
    batch = run_inputs(processor, "five_seconds.left")
    assert batch["input_features"].dtype == torch.float32
    assert (
        rounded.get_audio_features(batch["input_features"], batch["feature_attention_mask"]).dtype
        == torch.bfloat16
    )


@pytest.mark.parametrize("rows", [1, 2])
def test_nothing_grows_with_the_square_of_the_length(model, rows):
    ids = torch.randint(100, (rows, 4000), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[-1, : 100 * (rows - 1)] = 0
    with torch.profiler.profile(profile_memory=True) as profile:
        list(model.stream(ids, mask, max_new_tokens=2, eos_token_id=[]))
    assert (
        max(event.self_cpu_memory_usage for event in profile.events()) < 4000 * 4000
    )  # bytes of the largest allocation


def test_the_encoder_holds_eight_windows_however_many_there_are(model, monkeypatch):
    seen, encode = [], model.audio_tower.forward
    monkeypatch.setattr(
        model.audio_tower,
        "forward",
        lambda *inputs: (seen.append(len(inputs[0])), encode(*inputs))[1],
    )
    model.get_audio_features(torch.zeros(20, 128, 3000), torch.ones(20, 3000, dtype=torch.long))
    assert seen == [8, 8, 4]


# ---- Splice ----


def test_each_sound_slot_takes_one_audio_frame_in_order_in_place(model, processor):
    batch = run_inputs(processor, "five_seconds.left")
    frames = model.get_audio_features(batch["input_features"], batch["feature_attention_mask"])
    slots = batch["input_ids"] == model.config.audio_token_id
    x = model.splice(batch["input_ids"], frames)
    assert torch.equal(x[slots], frames)
    assert torch.equal(
        x[~slots], model.language_model.model.embed_tokens(batch["input_ids"][~slots])
    )


def test_ids_and_frames_that_disagree_are_refused(model, processor):
    batch = run_inputs(processor, "five_seconds.left")
    batch["feature_attention_mask"][:, 496:] = 0
    with pytest.raises(
        ValueError, match=r"^Audio tokens and features mismatch: tokens=125, frames=124\. "
    ):
        model(**batch)


def test_sound_ids_without_features_are_refused(model, processor):
    batch = run_inputs(processor, "five_seconds.left")
    with pytest.raises(ValueError, match=r"tokens=125, frames=0\. "):
        model.generate(batch["input_ids"], batch["attention_mask"])


def test_a_sound_id_that_the_model_says_is_an_id_like_any_other(model):
    cache = KeyValueCache(model.config.text_config, 1, 8, model.dtype, model.device)
    model.prefill(torch.tensor([[1, 2, 3]]), torch.ones(1, 3, dtype=torch.bool), cache=cache)
    logits = model.decode_one_token(torch.tensor([model.config.audio_token_id]), cache)
    assert logits.shape == (1, model.config.text_config.vocab_size) and logits.isfinite().all()


# ---- Padding and company ----


def test_left_padding_changes_nothing_a_real_token_sees(model, processor):
    left, right = run_inputs(processor, "batch.left"), run_inputs(processor, "batch.right")
    a, b = model(**left), model(**right)
    real_a, real_b = (
        a.logits[left["attention_mask"].bool()],
        b.logits[right["attention_mask"].bool()],
    )
    assert (real_a - real_b).abs().max() < 1e-4
    assert abs(a.loss - b.loss) < 1e-5


def test_what_stands_in_padding_changes_nothing(model, processor):
    batch = run_inputs(processor, "batch.left")
    ids = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 5)
    real = batch["attention_mask"].bool()
    assert torch.equal(
        model(**batch | {"input_ids": ids}).logits[real], model(**batch).logits[real]
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}])
def test_greedy_tokens_of_a_row_are_the_same_alone_and_in_company(model, processor, side, options):
    texts, audios = (
        ["What?", TEXT, "Is it loud or " * 9],
        [sound(n, seed=n) for n in (480321, 9000, 80000)],
    )
    batch = processor(texts, audios, padding_side=side)
    together = model.generate(**batch, max_new_tokens=24, **options)[
        :, batch["input_ids"].shape[1] :
    ]
    for row, (text, audio) in enumerate(zip(texts, audios)):
        one = processor(text, audio)
        alone = model.generate(**one, max_new_tokens=24, **options)[0, one["input_ids"].shape[1] :]
        assert torch.equal(together[row], alone)


def test_a_mask_of_another_shape_is_refused(model, processor):
    batch = processor("Hi", sound(4000)) | {"attention_mask": torch.ones(1, 5, dtype=torch.long)}
    with pytest.raises(ValueError, match="^attention_mask: of input_ids' shape"):
        model.generate(**batch)


def test_a_row_of_nothing_but_padding_is_refused(model):
    with pytest.raises(ValueError, match="^attention_mask: "):
        model(torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[1, 1, 1], [0, 0, 0]]))


def test_a_mask_may_be_boolean_and_a_masked_token_in_the_middle_is_as_if_it_were_not_there(model):
    a = model(torch.tensor([[1, 9, 2, 3]]), torch.tensor([[True, False, True, True]])).logits
    assert (a[:, [0, 2, 3]] - model(torch.tensor([[1, 2, 3]])).logits).abs().max() < 1e-5


def test_text_without_audio_is_answered(model, processor):
    batch = processor("Hello!")
    assert "input_features" not in batch
    assert model.generate(**batch, max_new_tokens=3).shape[1] == batch["input_ids"].shape[1] + 3


# ---- Loss ----


def test_labels_of_minus_100_do_not_count(model, processor):
    batch = run_inputs(processor, "five_seconds.left")
    batch["labels"][:, :-3] = -100
    logits = model(**batch).logits[0, -4:-1]
    wanted = torch.nn.functional.cross_entropy(logits, batch["input_ids"][0, -3:])
    assert abs(model(**batch).loss - wanted) < 1e-5


def test_the_loss_teaches_every_part(micro, processor):
    student = AudioFlamingo3ForConditionalGeneration.from_pretrained(micro, "cpu").requires_grad_(
        True
    )
    student(**run_inputs(processor, "batch.right")).loss.backward()
    without = [
        name
        for name, p in student.named_parameters()
        if p.grad is None or not p.grad.isfinite().all() or p.grad.abs().sum() == 0
    ]
    assert without == []


# ---- Prefill, decode, generate ----


def test_prefill_in_two_parts_is_prefill_in_one(model, processor):
    batch = without_labels(run_inputs(processor, "five_seconds.left"))
    whole = model(**batch).logits[:, -1]
    cache = KeyValueCache(model.config.text_config, 1, 200, model.dtype, model.device)
    cut = batch["input_ids"].shape[1] - 9
    model.prefill(
        batch["input_ids"][:, :cut],
        torch.ones(1, cut, dtype=torch.bool),
        batch["input_features"],
        batch["feature_attention_mask"],
        cache,
    )
    x = model.prefill(batch["input_ids"][:, cut:], torch.ones(1, 9, dtype=torch.bool), cache=cache)
    assert (model.language_model.lm_head(x[:, -1]) - whole).abs().max() < 1e-4


def test_audio_is_read_on_the_first_step_only(model, processor):
    calls = []
    hook = model.audio_tower.register_forward_pre_hook(lambda *_: calls.append(1))
    model.generate(**without_labels(run_inputs(processor, "five_seconds.left")), max_new_tokens=5)
    hook.remove()
    assert calls == [1]


def test_the_head_sees_one_position_a_step(model, processor):
    shapes = []
    hook = model.language_model.lm_head.register_forward_pre_hook(
        lambda _, inputs: shapes.append(tuple(inputs[0].shape))
    )
    model.generate(**without_labels(run_inputs(processor, "batch.left")), max_new_tokens=3)
    hook.remove()
    assert shapes == [(3, model.config.text_config.hidden_size)] * 3


def test_a_row_ends_at_its_own_end_id_and_goes_on_with_padding(model, processor, goldens):
    batch = without_labels(run_inputs(processor, "batch.left"))
    free = goldens["batch.left.greedy"]
    end = int(free[0, 2])
    ended = model.generate(**batch, max_new_tokens=64, eos_token_id=[end], pad_token_id=9)[
        :, batch["input_ids"].shape[1] :
    ]
    for row, said in zip(ended, free):
        stop = (said == end).nonzero()[:1, 0].tolist()
        length = stop[0] + 1 if stop else 64
        assert (
            torch.equal(row[:length], said[: min(length, len(row))]) and (row[length:] == 9).all()
        )


def test_generation_stops_when_every_row_has_ended(model, processor, goldens):
    batch = without_labels(run_inputs(processor, "five_seconds.left"))
    end = int(goldens["five_seconds.left.greedy"][0, 1])
    assert model.generate(**batch, eos_token_id=end).shape[1] <= batch["input_ids"].shape[1] + 2


def test_an_empty_list_of_end_ids_never_stops_early(model, processor, goldens, monkeypatch):
    batch = without_labels(run_inputs(processor, "five_seconds.left"))
    end = int(goldens["five_seconds.left.greedy"][0, 0])
    monkeypatch.setattr(
        model, "generation_config", dataclasses.replace(model.generation_config, eos_token_id=[end])
    )
    new = lambda **options: (
        model.generate(**batch, max_new_tokens=7, **options).shape[1] - batch["input_ids"].shape[1]
    )
    assert (new(), new(eos_token_id=[])) == (1, 7)


def test_stream_gives_the_tokens_of_generate_one_by_one(model, processor, goldens):
    batch = without_labels(run_inputs(processor, "batch.left"))
    steps = list(model.stream(**batch, max_new_tokens=4))
    assert torch.equal(torch.stack(steps, 1), goldens["batch.left.greedy"][:, :4])


def test_threads_that_share_a_model_say_what_one_says(model, processor, goldens):
    batch = without_labels(run_inputs(processor, "batch.left"))
    said = {}
    threads = [
        threading.Thread(
            target=lambda i=i: said.update({i: model.generate(**batch, max_new_tokens=16)})
        )
        for i in range(4)
    ]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert len(said) == 4 and all(
        torch.equal(new[:, -16:], goldens["batch.left.greedy"][:, :16]) for new in said.values()
    )


def test_more_tokens_than_positions_are_refused_before_any_work(model, processor, monkeypatch):
    monkeypatch.setattr(model, "prefill", lambda *_: pytest.fail("it began to work"))
    with pytest.raises(ValueError, match=r"max_new_tokens=4096 .* 4096 positions"):
        model.generate(
            **without_labels(run_inputs(processor, "five_seconds.left")), max_new_tokens=4096
        )


@pytest.mark.parametrize(
    "option, value",
    [
        ("max_new_tokens", 0),
        ("temperature", 0.0),
        ("top_k", -1),
        ("max_new_tokens", 2.5),
        ("temperature", "hot"),
        ("top_p", 1.5),
        ("repetition_penalty", -1.0),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(option, value):
    with pytest.raises(ValueError, match=f"^{option} is "):
        GenerationConfig(**{option: value})


# ---- Sampling ----


def draws(logits, count=4000, **options):
    torch.manual_seed(0)
    rows = torch.tensor([logits]).expand(count, -1)
    options = GenerationConfig(do_sample=True, **options)
    return (
        torch.bincount(
            next_token(rows, torch.zeros_like(rows, dtype=torch.bool), options),
            minlength=len(logits),
        )
        / count
    )


def test_sampling_follows_the_probabilities_at_its_temperature():
    logits = [1.0, 0.0, 2.0, -1.0]
    for temperature in (0.5, 1.0, 2.0):
        wanted = (torch.tensor(logits) / temperature).softmax(0)
        assert (draws(logits, temperature=temperature) - wanted).abs().max() < 0.03


def test_top_k_keeps_the_k_likeliest():
    assert (draws([1.0, 0.0, 2.0, -1.0], top_k=2) > 0).tolist() == [True, False, True, False]


def test_top_p_keeps_the_fewest_that_hold_p_of_the_probability():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().tolist()
    assert (draws(logits, top_p=0.45) > 0).tolist() == [True, False, False, False]
    assert (draws(logits, top_p=0.7) > 0).tolist() == [True, True, False, False]


def test_top_p_counts_within_what_top_k_left_at_the_temperature():
    logits = (
        torch.tensor([0.4, 0.3, 0.2, 0.1]).log().tolist()
    )  # of the first two, the first holds 0.4 / 0.7
    assert (draws(logits, top_k=2, top_p=0.55) > 0).tolist() == [True, False, False, False]
    assert (draws(logits, top_k=2, top_p=0.55, temperature=5.0) > 0).tolist() == [
        True,
        True,
        False,
        False,
    ]


def test_the_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_seen_ids():
    logits, seen = torch.tensor([[2.0, 1.9, -1.0]]), torch.tensor([[True, False, False]])
    assert next_token(logits, seen, GenerationConfig()).item() == 0
    assert next_token(logits, seen, GenerationConfig(repetition_penalty=1.3)).item() == 1
    negative = torch.tensor([[-1.0, -1.2, -9.0]])
    assert next_token(negative, seen, GenerationConfig(repetition_penalty=1.3)).item() == 1


# ---- The published snippet ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_published_snippet_runs(micro, processor, dtype):
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(
        micro, device_map="auto", dtype=dtype
    ).eval()
    conversations = [
        conversation(sound(40000), "Transcribe the input speech."),
        conversation(sound(500000), "Describe the song."),
    ]
    batch = processor.apply_chat_template(
        conversations,
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        sampling_rate=getattr(processor.feature_extractor, "sampling_rate", 16000),
    ).to(model.device)
    gen_ids = model.generate(**batch, max_new_tokens=5)
    texts = processor.batch_decode(
        gen_ids[:, batch["input_ids"].shape[1] :],
        skip_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
    inputs = processor(
        ["Transcribe the input speech.", "<sound><sound>\nDescribe the ambience."],
        [sound(40000), sound(500000)],
        padding_side="left",
        tensor_type="pt",
    )
    answers = [
        a.split("\nassistant\n")[-1]
        for a in processor.batch_decode(
            model.generate(**inputs, max_new_tokens=5), skip_special_tokens=True
        )
    ]
    assert len(texts) == len(answers) == 2


# ---- Shape of the code ----


def test_heads_are_counted_off_the_projections(model):
    config = AudioFlamingo3Config(
        AudioFlamingo3EncoderConfig(
            hidden_size=32, num_attention_heads=4, num_hidden_layers=1, intermediate_size=8
        ),
        Qwen2Config(
            vocab_size=9,
            hidden_size=32,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_hidden_layers=1,
            intermediate_size=8,
        ),
    )
    attention = AudioFlamingo3ForConditionalGeneration(config).audio_tower.layers[0].self_attn
    for projection in (
        attention.q_proj,
        attention.k_proj,
        attention.v_proj,
    ):  # one shard of two: half of the heads
        projection.weight.data = projection.weight.data[:16]
        projection.bias = None
    attention.out_proj.weight.data = attention.out_proj.weight.data[:, :16]
    assert attention(torch.zeros(1, 5, 32), None).shape == (1, 5, 32)
