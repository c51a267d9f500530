"""The decoder: embeddings to logits, in the layers of Qwen2.

Each layer is compared with a plain reference in float64; x is (T, channels) there.
"""

import math

import pytest
import torch

from af3 import (
    AudioFlamingo3Config,
    AudioFlamingo3ForConditionalGeneration,
    Qwen2Attention,
    Qwen2Config,
    Qwen2DecoderLayer,
    Qwen2MLP,
    Qwen2RMSNorm,
    rotary_tables,
    rotate_half,
)

# 4 query heads of 6 channels, in two groups.
SMALL = Qwen2Config(
    vocab_size=20,
    hidden_size=24,
    intermediate_size=10,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=0.01,
    rope_theta=100.0,
)


def random_states(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def tables(tokens):
    """cos and sin for a prompt of so many tokens."""
    return rotary_tables(torch.arange(tokens)[None], 6, 100.0, torch.float64)


# ---- The plain reference ----


def plain_linear(x, linear):
    bias = 0 if linear.bias is None else linear.bias
    return torch.stack([linear.weight @ token + bias for token in x])


def plain_rms_norm(x, norm, eps=0.01):
    rows = [token / ((token**2).mean() + eps).sqrt() for token in x]
    return torch.stack(rows) * norm.weight


def plain_rotation(x, position, base=100.0):
    """Turns the pairs of channels (i, i + D / 2) of x (D,)."""
    half = len(x) // 2
    turned = torch.zeros_like(x)
    for i in range(half):
        angle = position * base ** (-2 * i / len(x))
        turned[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        turned[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return turned


def plain_attention(x, attention):
    q = plain_linear(x, attention.q_proj)
    k = plain_linear(x, attention.k_proj)
    v = plain_linear(x, attention.v_proj)
    out = torch.zeros_like(q)
    for head in range(4):
        own = slice(6 * head, 6 * head + 6)
        group = head // 2  # query heads 0 and 1 share the first keys and values, 2 and 3 the others
        shared = slice(6 * group, 6 * group + 6)
        for t in range(len(x)):
            query = plain_rotation(q[t, own], t)
            keys = [plain_rotation(k[s, shared], s) for s in range(t + 1)]  # itself and before
            weights = torch.stack([query @ key / math.sqrt(6) for key in keys]).exp()
            weights = weights / weights.sum()
            out[t, own] = sum(weights[s] * v[s, shared] for s in range(t + 1))
    return plain_linear(out, attention.o_proj)


def plain_mlp(x, mlp):
    gate = plain_linear(x, mlp.gate_proj)
    silu = gate / (1 + torch.exp(-gate))
    return plain_linear(silu * plain_linear(x, mlp.up_proj), mlp.down_proj)


def plain_layer(x, layer):
    x = x + plain_attention(plain_rms_norm(x, layer.input_layernorm), layer.self_attn)
    return x + plain_mlp(plain_rms_norm(x, layer.post_attention_layernorm), layer.mlp)


def is_close(x, expected, limit=1e-6):
    return x.shape == expected.shape and (x - expected).abs().max() < limit


# ---- Configuration ----


@pytest.mark.differs("the defaults of transformers are those of another Qwen2")
def test_the_official_decoder_is_that_of_qwen2_5_7b_with_a_sound_id():
    config = Qwen2Config()
    assert (config.num_hidden_layers, config.hidden_size) == (28, 3584)
    assert (config.num_attention_heads, config.num_key_value_heads) == (28, 4)
    assert (config.head_dim, config.intermediate_size) == (128, 18944)
    assert (config.vocab_size, config.max_position_embeddings) == (151672, 32768)
    assert (config.rms_norm_eps, config.rope_theta) == (1e-6, 1e6)
    assert AudioFlamingo3Config().audio_token_id == 151669


# ---- RMSNorm ----


def test_rms_norm_divides_by_the_root_of_the_mean_square_plus_eps():
    norm = Qwen2RMSNorm(2, eps=1e-6)
    x = torch.tensor([[3.0, 4.0], [1e-3, 1e-3]])
    expected = torch.tensor([[3 / 12.5**0.5, 4 / 12.5**0.5], [0.5**0.5, 0.5**0.5]])
    assert is_close(norm(x), expected)


def test_in_bfloat16_rms_norm_rounds_before_it_multiplies_by_the_weight(randomized):
    norm = randomized(Qwen2RMSNorm(48, eps=1e-6)).bfloat16()
    x = random_states(20, 48).bfloat16()
    exact = torch.stack([row / ((row**2).mean() + 1e-6).sqrt() for row in x.double()])
    assert torch.equal(norm(x), exact.bfloat16() * norm.weight)


# ---- Rotary position embedding ----


def test_channel_i_of_d_turns_by_base_to_the_minus_2i_over_d_a_token():
    cos, sin = rotary_tables(torch.tensor([[0, 1, 3]]), 4, 100.0, torch.float32)
    angles = torch.tensor([[0.0, 0.0], [1.0, 0.1], [3.0, 0.3]])
    assert is_close(cos[0, 0], torch.cat([angles.cos(), angles.cos()], dim=-1))
    assert is_close(sin[0, 0], torch.cat([angles.sin(), angles.sin()], dim=-1))


def test_rotary_angles_are_computed_in_float32_in_a_bfloat16_model():
    cos, sin = rotary_tables(torch.arange(5000)[None], 8, 256.0, torch.bfloat16)
    angles = torch.arange(5000.0)[:, None] * torch.tensor([1, 1 / 4, 1 / 16, 1 / 64])
    assert torch.equal(cos[0, 0, :, :4], angles.cos().bfloat16())
    assert torch.equal(sin[0, 0, :, 4:], angles.sin().bfloat16())
    cos, sin = rotary_tables(torch.arange(5000)[None], 8, 1e4, torch.bfloat16)
    angles = torch.arange(5000.0)[:, None] * torch.tensor([1, 0.1, 0.01, 0.001])  # not exact
    assert is_close(cos[0, 0, :, :4].float(), angles.cos(), limit=0.004)


def test_channels_i_and_i_plus_half_are_the_pairs_that_turn():
    assert rotate_half(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [-3, -4, 1, 2]
    cos, sin = tables(4)
    x = random_states(4, 6)
    turned = x * cos[0, 0] + rotate_half(x) * sin[0, 0]
    assert is_close(turned, torch.stack([plain_rotation(x[t], t) for t in range(4)]))


# ---- Layers ----


def test_attention_is_causal_and_its_query_heads_share_keys_in_groups(randomized):
    attention = randomized(Qwen2Attention(SMALL, 0)).double()
    x = random_states(1, 5, 24)
    out = attention(x, *tables(5), None, None)[0]
    assert is_close(out, plain_attention(x[0], attention))


def test_in_the_decoder_only_queries_keys_and_values_have_a_bias(model):
    with_bias = set()
    for name, _ in model.named_parameters():
        of_decoder = "audio_tower" not in name and "projector" not in name
        if of_decoder and name.endswith(".bias"):
            with_bias.add(name.split(".")[-2])
    assert with_bias == {"q_proj", "k_proj", "v_proj"}


def test_the_feed_forward_network_is_swiglu(randomized):
    mlp = randomized(Qwen2MLP(SMALL)).double()
    x = random_states(5, 24)
    assert is_close(mlp(x), plain_mlp(x, mlp))


def test_a_layer_adds_attention_then_swiglu_to_tokens_that_it_normalizes(randomized):
    layer = randomized(Qwen2DecoderLayer(SMALL, 0)).double()
    x = random_states(1, 5, 24)
    out = layer(x, *tables(5), None, None)[0]
    assert is_close(out, plain_layer(x[0], layer))


def decoder_of(model):
    """The embedding, layers, last norm and output layer of a model."""
    modules = {name: module for name, module in model.named_modules() if "audio" not in name}

    def find(ending):
        (found,) = [module for name, module in modules.items() if name.endswith(ending)]
        return found

    return find("embed_tokens"), find("layers"), find(".norm"), find("lm_head")


@torch.no_grad()
def test_logits_come_from_embedding_layers_a_last_norm_and_an_output_layer(randomized, tiny_config):
    config = tiny_config()
    config.text_config = SMALL
    model = randomized(AudioFlamingo3ForConditionalGeneration(config)).double()
    embedding, layers, norm, output = decoder_of(model)
    x = embedding.weight[[3, 1, 4, 1, 5]]
    for layer in layers:
        x = plain_layer(x, layer)
    logits = model(torch.tensor([[3, 1, 4, 1, 5]])).logits[0]
    assert is_close(logits, plain_linear(plain_rms_norm(x, norm), output), limit=1e-5)


def test_embedding_and_output_layer_do_not_share_their_weights(model):
    embedding, _, _, output = decoder_of(model)
    assert embedding.weight.data_ptr() != output.weight.data_ptr()


# ---- What a token sees ----


def test_no_token_sees_a_later_one(model):
    logits = model(torch.tensor([[1, 2, 3, 4, 5]])).logits
    changed = model(torch.tensor([[1, 2, 3, 9, 5]])).logits
    difference = (changed - logits).abs().amax(-1)[0]
    assert difference[:3].max() == 0
    assert difference[3:].min() > 1e-3


def test_padding_on_either_side_changes_nothing_in_whatever_row(model):
    ids = torch.tensor([[6, 9, 1, 2, 3], [4, 5, 7, 9, 9], [8, 1, 0, 0, 0], [6, 5, 4, 2, 1]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    logits = model(ids, mask).logits
    for row, is_real in enumerate(mask.bool()):
        alone = model(ids[row, is_real][None]).logits[0]
        assert is_close(logits[row, is_real], alone, limit=1e-4)
    assert logits.isfinite().all()  # on padding, too


@pytest.mark.differs("in transformers, padding between tokens takes positions")
def test_padding_between_tokens_takes_no_position(model):
    mask = torch.tensor([[True, False, True, False, True]])
    logits = model(torch.tensor([[1, 7, 2, 9, 3]]), mask).logits[mask]
    assert is_close(logits, model(torch.tensor([[1, 2, 3]])).logits[0], limit=1e-4)


def test_without_an_attention_mask_every_token_is_real(model):
    ids = torch.tensor([[0, 1, 643, 0]])
    assert torch.equal(model(ids).logits, model(ids, torch.ones_like(ids)).logits)
