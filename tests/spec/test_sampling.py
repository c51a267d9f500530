"""The next token: from logits to one new id for each row."""

import math

import pytest
import torch

from af3 import GenerationConfig, next_token, penalize_repetition


def frequencies(logits, **options):
    """How often each id is drawn, of 4000 times."""
    torch.manual_seed(0)
    rows = torch.tensor([logits], dtype=torch.float32).expand(4000, -1)
    ids = next_token(rows, GenerationConfig(do_sample=True, **options))
    return torch.bincount(ids, minlength=len(logits)) / 4000


def drawn(logits, **options):
    """The ids that are ever drawn."""
    return frequencies(logits, **options).nonzero()[:, 0].tolist()


# ---- Greedy ----


def test_without_sampling_each_row_takes_its_likeliest_id():
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, -1.0, 0.0]])
    assert next_token(logits, GenerationConfig()).tolist() == [1, 0]


def test_without_sampling_its_options_have_no_effect_whatever_they_are():
    options = GenerationConfig(do_sample=False, temperature=0.0, top_k=-1, top_p=0.0)
    assert next_token(torch.tensor([[1.0, 3.0, 2.0]]), options).tolist() == [1]


# ---- Temperature ----


def test_the_temperature_divides_the_logits():
    # Three to one; squared, nine to one; its root, 1.73 to one.
    for temperature, expected in [(1.0, 0.75), (0.5, 0.9), (2.0, 0.634)]:
        drawn_frequencies = frequencies([math.log(3), 0.0], temperature=temperature)
        assert abs(float(drawn_frequencies[0]) - expected) < 0.03


# ---- Top-k ----


def test_top_k_keeps_the_k_likeliest_ids_in_their_proportions():
    kept = frequencies([0.0, -0.1, math.log(3), -0.2], top_k=2)
    assert kept.nonzero()[:, 0].tolist() == [0, 2]
    assert abs(float(kept[2]) - 0.75) < 0.03


@pytest.mark.differs("transformers fills in its defaults only in generate")
def test_top_k_is_50_if_nothing_is_said_as_in_transformers():
    logits = (torch.arange(60) / 100).tolist()
    assert drawn(logits) == list(range(10, 60))


def test_a_top_k_of_none_or_0_or_of_all_ids_is_no_limit():
    for top_k in (None, 0, 60, 1000):
        assert drawn([0.0] * 60, top_k=top_k) == list(range(60))


# ---- Top-p ----


def test_top_p_keeps_the_fewest_likeliest_ids_that_sum_to_p():
    logits = [math.log(p) for p in (0.05, 0.5, 0.15, 0.3)]
    assert drawn(logits, top_p=0.7) == [1, 3]
    assert drawn(logits, top_p=0.9) == [1, 2, 3]
    assert drawn(logits, top_p=0.01) == [1]
    assert drawn(logits, top_p=1.0) == drawn(logits, top_p=None) == [0, 1, 2, 3]


def test_where_the_sum_is_exactly_p_top_p_keeps_no_further_id():
    for top_p, num_kept in [(0.25, 1), (0.26, 2), (0.5, 2), (0.51, 3), (0.75, 3), (0.76, 4)]:
        assert len(drawn([0.0, 0.0, 0.0, 0.0], top_p=top_p)) == num_kept


def test_top_p_counts_the_probabilities_among_those_that_top_k_keeps():
    logits = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
    assert drawn(logits, top_p=0.55) == [0, 1]
    assert drawn(logits, top_k=2, top_p=0.55) == [0]  # 0.4 / 0.7 = 0.57


def test_top_p_counts_the_probabilities_at_the_temperature():
    logits = [math.log(3), 0.0]  # 0.75 and 0.25, but nearly 0.5 each at temperature 100
    assert drawn(logits, top_p=0.7) == [0]
    assert drawn(logits, top_p=0.7, temperature=100.0) == [0, 1]


# ---- Repetition penalty ----


def test_the_repetition_penalty_divides_positive_logits_of_seen_ids_and_multiplies_others():
    logits = torch.tensor([[3.0, -1.0, 1.0, -2.0], [3.0, -1.0, 1.0, -2.0]])
    penalized = penalize_repetition(logits, torch.tensor([[0, 1], [2, 3]]), 2.0)
    assert penalized.tolist() == [[1.5, -2.0, 1.0, -2.0], [3.0, -1.0, 0.5, -4.0]]


def test_an_id_is_penalized_once_however_often_it_was_seen():
    penalized = penalize_repetition(torch.tensor([[4.0, 1.0]]), torch.tensor([[0, 0, 0]]), 2.0)
    assert penalized.tolist() == [[2.0, 1.0]]


# ---- Options ----


@pytest.mark.differs("transformers fills in its defaults only in generate")
def test_the_options_if_nothing_is_said_are_greedy_512_tokens_and_no_end():
    options = GenerationConfig()
    assert (options.do_sample, options.max_new_tokens) == (False, 512)
    assert (options.temperature, options.top_k, options.top_p) == (1.0, 50, None)
    assert options.repetition_penalty == 1.0
    assert (options.eos_token_id, options.pad_token_id) == ([], 0)


@pytest.mark.differs("transformers takes some of these, and its sentences are others")
def test_a_top_p_of_0_or_above_1_and_a_temperature_of_0_are_refused():
    for option, value in [("top_p", 0.0), ("top_p", 1.01), ("temperature", 0.0)]:
        with pytest.raises(ValueError, match=f"^{option} is {value}; "):
            GenerationConfig(do_sample=True, **{option: value})
