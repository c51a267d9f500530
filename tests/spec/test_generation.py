"""Generation: prompts are read once, then ids are added one by one.

Many of these tests ask a model that counts: after id n, its likeliest id is n + 1, then n + 2 ...
"""

import pytest
import torch

from af3 import AudioFlamingo3ForConditionalGeneration, GenerationConfig, KeyValueCache


@pytest.fixture
def counting_model(tiny_config, randomized):
    """A model of 12 ids. After id n, the logit of n + 1 is 12, of n + 2 is 11, ... of n is 1."""
    config = tiny_config()
    config.text_config.vocab_size = config.text_config.hidden_size = 12
    config.text_config.num_attention_heads = 2
    config.text_config.num_key_value_heads = 1
    config.text_config.max_position_embeddings = 20
    config.audio_token_id = 11
    model = randomized(AudioFlamingo3ForConditionalGeneration(config))
    rows = torch.arange(12)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")) and "audio" not in name:
            weight.data.zero_()  # the layers add nothing
        elif name.endswith("embed_tokens.weight"):
            weight.data.copy_(torch.eye(12))
        elif name.endswith(("language_model.norm.weight", "language_model.model.norm.weight")):
            weight.data.fill_(12**-0.5)  # the norm of a unit vector multiplies it by 12**0.5
        elif name.endswith("lm_head.weight"):
            weight.data.copy_(12 - (rows[:, None] - rows - 1) % 12)
    return model


@pytest.fixture
def inputs_of():
    """inputs_of(module): a list to which each call of the module adds its first argument."""
    hooks = []

    def record(module):
        inputs = []
        hook = module.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
        hooks.append(hook)
        return inputs

    yield record
    for hook in hooks:
        hook.remove()


def new_ids(model, prompts, mask=None, **options):
    """The new ids of prompts, lists of ids of one length."""
    mask = None if mask is None else torch.tensor(mask)
    ids = model.generate(torch.tensor(prompts), mask, **options)
    return ids[:, len(prompts[0]) :].tolist()


def greedy_by_hand(model, ids, steps, **audio):
    """The likeliest ids, where each step reads everything anew, with no cache."""
    ids = torch.tensor([ids])
    for _ in range(steps):
        likeliest = model(ids, **audio).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, likeliest], dim=1)
    return ids[0, -steps:].tolist()


def audio(*mel_frames):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(len(mel_frames), 128, 3000, generator=generator)
    mask = torch.arange(3000) < torch.tensor(mel_frames)[:, None]
    return {"input_features": features, "feature_attention_mask": mask.long()}


def module_of(model, ending):
    (module,) = [module for name, module in model.named_modules() if name.endswith(ending)]
    return module


# ---- New ids ----


def test_generate_returns_each_prompt_with_its_new_ids(counting_model):
    ids = counting_model.generate(torch.tensor([[7, 3], [0, 5]]), max_new_tokens=3)
    assert ids.tolist() == [[7, 3, 4, 5, 6], [0, 5, 6, 7, 8]]


@pytest.mark.differs("transformers has no stream of ids")
def test_stream_gives_the_same_ids_step_by_step_each_before_the_next_is_computed(
    counting_model, inputs_of
):
    reads = inputs_of(module_of(counting_model, "embed_tokens"))
    steps = counting_model.stream(torch.tensor([[7, 3], [0, 5]]), max_new_tokens=3)
    assert next(steps).tolist() == [4, 6]
    assert len(reads) == 1
    assert [ids.tolist() for ids in steps] == [[5, 7], [6, 8]]


@pytest.mark.differs("transformers generates after padding on the left only")
def test_the_last_real_token_of_each_row_predicts_its_first_new_one(counting_model):
    prompts = [[7, 3, 0], [0, 0, 5], [0, 8, 0]]
    mask = [[1, 1, 0], [0, 0, 1], [0, 1, 0]]
    assert new_ids(counting_model, prompts, mask, max_new_tokens=2) == [[4, 5], [6, 7], [9, 10]]


def test_a_sound_id_that_the_model_generates_is_embedded_like_any_id(counting_model):
    counting_model.config.audio_token_id = 5
    assert new_ids(counting_model, [[3]], max_new_tokens=4) == [[4, 5, 6, 7]]


@pytest.mark.differs("transformers also generates ids without a text")
def test_ids_without_a_text_are_never_generated(counting_model):
    counting_model.config.num_tokens = 6  # of 12
    assert new_ids(counting_model, [[3]], max_new_tokens=4) == [[4, 5, 0, 1]]
    options = {"do_sample": True, "temperature": 100.0, "max_new_tokens": 19}
    assert max(new_ids(counting_model, [[3]], **options)[0]) < 6


# ---- Cache ----


def test_the_cache_changes_nothing(model):
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    assert new_ids(model, [prompt], max_new_tokens=24) == [greedy_by_hand(model, prompt, 24)]


def test_the_prompt_is_read_once_then_one_id_a_step_and_never_the_last(counting_model, inputs_of):
    reads = inputs_of(module_of(counting_model, "embed_tokens"))
    new_ids(counting_model, [[9, 8, 7], [3, 2, 1]], max_new_tokens=3)
    assert [ids.tolist() for ids in reads] == [[[9, 8, 7], [3, 2, 1]], [[8], [2]], [[9], [3]]]


def test_the_output_layer_computes_one_position_of_each_row_a_step(counting_model, inputs_of):
    states = inputs_of(module_of(counting_model, "lm_head"))
    new_ids(counting_model, [[9, 8, 7], [3, 2, 1]], max_new_tokens=3)
    assert [x.numel() for x in states] == [2 * 12, 2 * 12, 2 * 12]


def test_a_row_gets_the_same_ids_alone_and_padded_on_the_left_in_a_batch(model):
    prompts = [[3, 1, 4, 1, 5, 9], [7, 7, 7, 2, 7, 1], [7, 7, 7, 7, 7, 8]]
    mask = [[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1]]
    alone = [greedy_by_hand(model, row, 12) for row in ([3, 1, 4, 1, 5, 9], [2, 7, 1], [8])]
    assert new_ids(model, prompts, mask, max_new_tokens=12) == alone


@pytest.mark.differs("transformers generates after padding on the left only")
def test_a_row_gets_the_same_ids_alone_and_padded_on_any_side_in_a_batch(model):
    prompts = [[3, 1, 4, 1, 5, 9], [2, 7, 1, 7, 7, 7], [7, 7, 8, 7, 7, 7]]
    mask = [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0]]
    alone = [greedy_by_hand(model, row, 12) for row in ([3, 1, 4, 1, 5, 9], [2, 7, 1], [8])]
    assert new_ids(model, prompts, mask, max_new_tokens=12) == alone


def test_audio_is_encoded_once_and_heard_at_every_step(model, inputs_of):
    prompt = torch.tensor([[3, 644, 644, 5]])
    reads = inputs_of(model.audio_tower)
    new = model.generate(prompt, **audio(8), max_new_tokens=6)[0, 4:]
    assert len(reads) == 1
    assert new.tolist() == greedy_by_hand(model, prompt[0].tolist(), 6, **audio(8))


@pytest.mark.differs("transformers reads a prompt in one part")
def test_a_prompt_is_read_in_parts_of_4096_then_1024_tokens_which_limits_memory(
    counting_model, inputs_of
):
    counting_model.config.text_config.max_position_embeddings = 6000
    parts = inputs_of(module_of(counting_model, "language_model.model.layers.0"))
    new_ids(counting_model, [[3] * 5123], max_new_tokens=1)
    assert [x.shape[1] for x in parts] == [4096, 1024, 3]


@torch.no_grad()
def test_reading_a_long_prompt_in_parts_changes_nothing(tiny_config, randomized):
    config = tiny_config()
    config.text_config.max_position_embeddings = 6000
    model = randomized(AudioFlamingo3ForConditionalGeneration(config))
    for name, weight in model.named_parameters():
        if name.endswith("q_proj.weight"):
            weight.mul_(20)  # so that each token attends to few others and depends on them
    prompt = torch.randint(600, (1, 5124), generator=torch.Generator().manual_seed(0))
    likeliest = model(prompt).logits[0].argmax(-1)  # in one part
    for tokens in (4098, 4100, 5124):
        ids = model.generate(prompt[:, :tokens], max_new_tokens=1)
        assert ids[0, -1] == likeliest[tokens - 1]


@pytest.mark.differs("transformers continues a cache with all ids so far")
def test_a_conversation_that_continues_its_cache_is_answered_like_one_long_prompt(model):
    cache = KeyValueCache(model.config.text_config, 1, 40, torch.float32, "cpu")
    first = torch.tensor([[3, 1, 4, 1]])
    (answer,) = model.stream(first, cache=cache, max_new_tokens=1)
    second = torch.tensor([[int(answer), 5, 9, 2]])  # begins with the id that was not read
    steps = model.stream(second, cache=cache, max_new_tokens=12)
    expected = greedy_by_hand(model, [3, 1, 4, 1, *second[0].tolist()], 12)
    assert [int(ids) for ids in steps] == expected


@pytest.mark.differs("transformers continues a cache with all ids so far")
def test_rows_of_a_conversation_may_be_padded_in_every_turn(model):
    cache = KeyValueCache(model.config.text_config, 2, 40, torch.float32, "cpu")
    first = torch.tensor([[3, 1, 4], [7, 7, 5]]), torch.tensor([[1, 1, 1], [0, 0, 1]])
    second = torch.tensor([[9, 7, 7], [2, 6, 8]]), torch.tensor([[1, 0, 0], [1, 1, 1]])
    next(model.stream(*first, cache=cache, max_new_tokens=1))
    answers = torch.stack(list(model.stream(*second, cache=cache, max_new_tokens=8)), dim=1)
    assert answers[0].tolist() == greedy_by_hand(model, [3, 1, 4, 9], 8)
    assert answers[1].tolist() == greedy_by_hand(model, [5, 2, 6, 8], 8)


def test_inference_keeps_no_graph(counting_model, inputs_of):
    states = inputs_of(module_of(counting_model, "lm_head"))
    new_ids(counting_model, [[3]], max_new_tokens=2)
    assert [x.requires_grad for x in states] == [False, False]
    assert torch.is_grad_enabled()


# ---- Ends ----


def test_a_row_ends_with_an_end_id_or_one_of_a_list_or_else_with_max_new_tokens(counting_model):
    def answer(eos_token_id):
        options = {"eos_token_id": eos_token_id, "max_new_tokens": 5}
        return new_ids(counting_model, [[6, 3]], **options)

    assert answer(6) == answer([6]) == [[4, 5, 6]]  # that in the prompt ends nothing
    assert answer([8, 5]) == [[4, 5]]
    assert answer([]) == answer([3]) == [[4, 5, 6, 7, 8]]


def test_a_batch_goes_on_until_its_last_row_has_ended_and_ended_rows_are_padded(counting_model):
    options = {"eos_token_id": 8, "pad_token_id": 1, "max_new_tokens": 9}
    expected = [[8, 1, 1, 1, 1], [4, 5, 6, 7, 8], [7, 8, 1, 1, 1]]
    assert new_ids(counting_model, [[7], [3], [6]], **options) == expected


def test_prompt_and_new_tokens_may_just_fill_the_positions(counting_model):  # of which it has 20
    assert len(new_ids(counting_model, [[3] * 15], max_new_tokens=5)[0]) == 5


@pytest.mark.differs("transformers only warns")
def test_one_token_more_than_the_positions_is_refused(counting_model):
    message = "prompt's 15 tokens and max_new_tokens=6 are more than the model's 20 positions"
    with pytest.raises(ValueError, match=message):
        new_ids(counting_model, [[3] * 15], max_new_tokens=6)


@pytest.mark.differs("the caches of transformers grow")
def test_a_turn_may_just_fill_the_cache_and_one_token_more_is_refused(counting_model):
    text_config = counting_model.config.text_config
    cache = KeyValueCache(text_config, 1, 8, torch.float32, "cpu")
    list(counting_model.stream(torch.tensor([[1, 2, 3]]), cache=cache, max_new_tokens=1))
    with pytest.raises(ValueError, match="prompt's 5 tokens and max_new_tokens=4"):
        list(counting_model.stream(torch.tensor([[4, 5]]), cache=cache, max_new_tokens=4))
    steps = counting_model.stream(torch.tensor([[4, 5]]), cache=cache, max_new_tokens=3)
    assert [int(ids) for ids in steps] == [6, 7, 8]


# ---- Options ----


@pytest.mark.differs("in transformers, an end id of None is no end")
def test_an_option_that_is_absent_or_none_takes_the_value_of_the_checkpoint(counting_model):
    counting_model.generation_config = GenerationConfig(max_new_tokens=4, eos_token_id=[6])
    assert new_ids(counting_model, [[3]]) == [[4, 5, 6]]
    options = {"max_new_tokens": None, "eos_token_id": None, "do_sample": None}
    assert new_ids(counting_model, [[3]], **options) == [[4, 5, 6]]
    assert new_ids(counting_model, [[3]], max_new_tokens=2) == [[4, 5]]
    assert new_ids(counting_model, [[3]], eos_token_id=[]) == [[4, 5, 6, 7]]


def test_only_a_top_k_or_top_p_of_none_is_no_limit_instead(counting_model):
    torch.manual_seed(0)
    counting_model.generation_config = GenerationConfig(do_sample=True, top_k=1, top_p=0.1)
    assert new_ids(counting_model, [[3]], max_new_tokens=3) == [[4, 5, 6]]
    options = {"top_k": None, "top_p": None, "temperature": 1e6, "max_new_tokens": 8}
    assert new_ids(counting_model, [[3]], **options) != [[4, 5, 6, 7, 8, 9, 10, 11]]


def test_sampled_ids_follow_each_other_as_the_options_say(counting_model):
    torch.manual_seed(0)
    options = {"do_sample": True, "top_k": 2, "temperature": 9.0, "max_new_tokens": 17}
    (ids,) = new_ids(counting_model, [[3]], **options)
    steps = {(after - before) % 12 for before, after in zip([3, *ids], ids)}
    assert steps == {1, 2}


# ---- Repetition penalty ----


def test_the_repetition_penalty_counts_the_ids_of_the_prompt_and_the_new_ones(counting_model):
    options = {"repetition_penalty": 1e5, "max_new_tokens": 11}
    # First all that were not in the prompt. Then all have been seen, 4 as well as 3.
    expected = [4, 6, 7, 8, 9, 10, 11, 0, 1, 2, 3]
    assert new_ids(counting_model, [[5, 3]], **options) == [expected]


def test_a_repetition_penalty_below_1_makes_seen_ids_likelier(counting_model):
    options = {"repetition_penalty": 1e-5, "max_new_tokens": 1}
    assert new_ids(counting_model, [[5, 3]], **options) == [[5]]  # without it, 4


def test_the_repetition_penalty_does_not_count_padding_or_the_other_rows(counting_model):
    prompts = [[4, 3], [8, 7], [5, 4]]
    mask = [[0, 1], [1, 1], [1, 1]]
    options = {"repetition_penalty": 1e5, "max_new_tokens": 2}
    assert new_ids(counting_model, prompts, mask, **options) == [[4, 5], [9, 10], [6, 7]]


@pytest.mark.differs("transformers continues a cache with all ids so far")
def test_the_repetition_penalty_counts_past_ids_of_a_conversation(counting_model):
    options = {"repetition_penalty": 1e5, "max_new_tokens": 2, "past_ids": torch.tensor([[4, 6]])}
    steps = counting_model.stream(torch.tensor([[3]]), **options)
    assert [int(ids) for ids in steps] == [5, 7]


def test_the_repetition_penalty_comes_before_top_k(counting_model):
    options = {"do_sample": True, "top_k": 1, "repetition_penalty": 1e5, "max_new_tokens": 1}
    assert new_ids(counting_model, [[4, 3]], **options) == [[5]]


def test_the_repetition_penalty_acts_on_float32_logits_in_a_bfloat16_model(counting_model):
    # After 3, the logit of 4 is 12, of 5 is 11. Here 12 / 1.0915 = 10.994 is 11 in bfloat16.
    options = {"repetition_penalty": 1.0915, "max_new_tokens": 1}
    assert new_ids(counting_model.bfloat16(), [[4, 3]], **options) == [[5]]
