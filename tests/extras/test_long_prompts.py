"""Long prompts: little memory, and faster attention that gives the numbers of the plain one."""

import pytest
import torch
import torch.nn.functional as F

from af3 import AudioFlamingo3ForConditionalGeneration, causal_mask
from extras import long_prompts
from extras.long_prompts import attend_to_past_and_part, use_unmasked_attention
from processor import AudioFlamingo3Processor
from signals import sound

from_pretrained = AudioFlamingo3ForConditionalGeneration.from_pretrained


@pytest.fixture
def changed_model(micro):
    return use_unmasked_attention(from_pretrained(micro, "cpu"))


@pytest.fixture
def short_parts(monkeypatch):
    """Reads a prompt in parts of 100 and then 70 tokens."""
    monkeypatch.setattr("plumbing.prompt_parts.FIRST_PART", 100)
    monkeypatch.setattr("plumbing.prompt_parts.LATER_PART", 70)


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_attention_to_past_and_part_is_causal_attention(dtype, limit):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 6, 50, 16, generator=generator).to(dtype)
    k, v = torch.randn(2, 2, 2, 170, 16, generator=generator).to(dtype)
    mask = causal_mask(torch.ones(2, 170, dtype=torch.bool), tokens=50)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    assert (attend_to_past_and_part(q, k, v) - expected).abs().max() < limit


def test_large_scores_stay_finite():
    q = torch.full((1, 2, 4, 8), 100.0)
    k, v = torch.full((2, 1, 1, 9, 8), 100.0)
    assert torch.equal(attend_to_past_and_part(q, k, v), torch.full((1, 2, 4, 8), 100.0))


def test_this_version_of_pytorch_has_the_operator():
    assert long_prompts.is_possible()  # torch 2.13


def test_a_prompt_in_parts_gives_the_logits_of_one_part(
    model, changed_model, processor, short_parts, monkeypatch
):
    calls = []

    def noting(q, k, v):
        calls.append(q.shape[2])
        return attend_to_past_and_part(q, k, v)

    monkeypatch.setattr(long_prompts, "attend_to_past_and_part", noting)
    batch = processor("What?", sound(130000))
    expected = model(**batch).logits[:, -1]
    cache = changed_model.new_cache(rows=1, capacity=400)
    mask = batch.pop("attention_mask").bool()
    x = changed_model.prefill(attention_mask=mask, cache=cache, **batch)
    assert set(calls) == {70, mask.shape[1] - 100 - 70}
    assert (changed_model.language_model.lm_head(x[:, -1]) - expected).abs().max() < 1e-4


def test_rows_with_padding_are_answered_as_before(model, changed_model, processor, short_parts):
    batch = processor(["What?", "Is it loud?"], [sound(130000), sound(90000)])
    options = {"max_new_tokens": 8, "eos_token_id": []}
    assert torch.equal(
        changed_model.generate(**batch, **options), model.generate(**batch, **options)
    )


def test_without_the_operator_the_plain_attention_is_used(
    model, changed_model, processor, short_parts, monkeypatch
):
    monkeypatch.setattr(long_prompts, "is_possible", lambda: False)
    monkeypatch.setattr(long_prompts, "attend_to_past_and_part", None)
    batch = processor("What?", sound(130000))
    options = {"max_new_tokens": 4, "eos_token_id": []}
    assert torch.equal(
        changed_model.generate(**batch, **options), model.generate(**batch, **options)
    )


# ---- Memory ----


def largest_allocation(function):
    """In bytes."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    return max(event.self_cpu_memory_usage for event in profile.events())


@pytest.mark.parametrize("rows", [1, 2])
def test_no_allocation_grows_with_the_square_of_the_tokens(model, rows):
    input_ids = torch.randint(100, (rows, 4000), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(input_ids)
    if rows == 2:
        mask[1, :100] = 0
    largest = largest_allocation(lambda: model.generate(input_ids, mask, max_new_tokens=2))
    assert largest < 4000 * 4000


def test_no_allocation_grows_with_the_square_of_the_windows(families):
    processor = AudioFlamingo3Processor.from_pretrained(families["music"])
    model = from_pretrained(families["music"], "cpu")
    batch = processor("What?", sound(10 * 480000))  # 7,500 audio frames
    batch["attention_mask"] = batch["attention_mask"].bool()
    assert largest_allocation(lambda: model.prefill(**batch)) < 7500 * 7500
