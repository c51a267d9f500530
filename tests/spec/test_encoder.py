"""The encoder: log-mel windows to audio frames, and the projector to the decoder's width.

Each layer is compared with a plain reference in float64. The encoders of these tests are small:
windows of 12 mel frames with 3 mel bins, so 6 conv frames and 3 audio frames of 8 channels.
"""

import copy
import math

import pytest
import torch

from af3 import (
    AudioFlamingo3Attention,
    AudioFlamingo3Encoder,
    AudioFlamingo3EncoderConfig,
    AudioFlamingo3MultiModalProjector,
)


def small_config(layers=1, heads=2):
    return AudioFlamingo3EncoderConfig(
        num_mel_bins=3,
        hidden_size=8,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=16,
        max_source_positions=6,
    )


@pytest.fixture
def encoder(randomized):
    """encoder(layers): with random weights, in float64."""
    return lambda layers: randomized(AudioFlamingo3Encoder(small_config(layers))).double()


@pytest.fixture
def encode_frames(encoder):
    """encode_frames(frames): what pool and last LayerNorm make of 6 given conv frames (6, 8)."""

    @torch.no_grad()
    def encode(frames):
        module = encoder(layers=0)
        for name, weight in module.named_parameters():
            if not name.startswith("layer_norm"):
                weight.zero_()  # the convolutions give zeros, to which positions are added
        module.embed_positions.weight.copy_(frames)
        module.layer_norm.weight.fill_(1)
        module.layer_norm.bias.zero_()
        return module(*windows(12))[0]

    return encode


def windows(*mel_frames, mel_bins=3, length=12):
    """Random features (W, mel bins, length), and the mask (W, length) of the real mel frames."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(mel_frames), mel_bins, length)
    features = torch.randn(shape, generator=generator, dtype=torch.float64)
    mask = torch.arange(length) < torch.tensor(mel_frames)[:, None]
    return features, mask.long()


def official_windows(*mel_frames):
    """The same for the whole model: 128 mel bins, 3000 mel frames, float32."""
    features, mask = windows(*mel_frames, mel_bins=128, length=3000)
    return features.float(), mask


# ---- The plain reference, in float64; x (T, channels) ----


def plain_linear(x, linear):
    bias = 0 if linear.bias is None else linear.bias
    return torch.stack([linear.weight @ frame + bias for frame in x])


def plain_layer_norm(x, norm):
    rows = []
    for frame in x:
        deviations = frame - frame.mean()
        variance = (deviations**2).mean()
        rows.append(deviations / (variance + 1e-5).sqrt() * norm.weight + norm.bias)
    return torch.stack(rows)


def plain_gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def plain_convolution(x, conv, stride):
    zeros = torch.zeros_like(x[:1])
    padded = torch.cat([zeros, x, zeros])
    frames = []
    for start in range(0, len(x), stride):
        seen = padded[start : start + 3].T  # (channels, 3)
        frames.append((conv.weight * seen).sum((1, 2)) + conv.bias)
    return torch.stack(frames)


def plain_attention(x, attention, heads, num_keys):
    size = x.shape[1] // heads
    q = plain_linear(x, attention.q_proj)
    k = plain_linear(x, attention.k_proj)
    v = plain_linear(x, attention.v_proj)
    out = torch.zeros_like(x)
    for head in range(heads):
        channels = slice(head * size, (head + 1) * size)
        for t in range(len(x)):
            scores = [q[t, channels] @ k[s, channels] / math.sqrt(size) for s in range(num_keys)]
            weights = torch.stack(scores).exp()
            weights = weights / weights.sum()
            out[t, channels] = sum(weights[s] * v[s, channels] for s in range(num_keys))
    return plain_linear(out, attention.out_proj)


def plain_layer(x, layer, num_keys):
    normed = plain_layer_norm(x, layer.self_attn_layer_norm)
    x = x + plain_attention(normed, layer.self_attn, 2, num_keys)
    normed = plain_layer_norm(x, layer.final_layer_norm)
    return x + plain_linear(plain_gelu(plain_linear(normed, layer.fc1)), layer.fc2)


@torch.no_grad()
def plain_encoder(features, encoder, conv_frames):
    """The audio frames of a window (mel bins, T) that has so many real conv frames."""
    x = plain_gelu(plain_convolution(features.T, encoder.conv1, stride=1))
    x = plain_gelu(plain_convolution(x, encoder.conv2, stride=2))
    x = x + encoder.embed_positions.weight
    for layer in encoder.layers:
        x = plain_layer(x, layer, conv_frames)
    pairs = [(x[a] + x[a + 1]) / 2 for a in range(0, conv_frames - 1, 2)]
    return plain_layer_norm(torch.stack(pairs), encoder.layer_norm)


def is_close(x, expected, limit=1e-9):
    return x.shape == expected.shape and (x - expected).abs().max() < limit


# ---- Convolutions, positions, layers ----


def test_the_official_encoder_is_that_of_whisper_large_v3():
    config = AudioFlamingo3EncoderConfig()
    assert (config.num_hidden_layers, config.hidden_size) == (32, 1280)
    assert (config.num_attention_heads, config.intermediate_size) == (20, 5120)
    assert (config.num_mel_bins, config.max_source_positions) == (128, 1500)


def test_two_convolutions_of_three_frames_with_an_exact_gelu_halve_the_mel_frames(encoder):
    module = encoder(layers=0)
    features, mask = windows(12)
    assert is_close(module(features, mask)[0], plain_encoder(features[0], module, conv_frames=6))


def test_each_conv_frame_gets_the_position_of_its_place_in_its_own_window(encode_frames):
    frames = torch.zeros(6, 8, dtype=torch.float64)
    frames[4:, 3] = 1.0
    x = encode_frames(frames)
    assert x.argmax(-1).tolist() == [0, 0, 3]
    assert x[:2].abs().max() == 0


def test_attention_reads_the_real_keys_head_by_head(randomized):
    attention = randomized(AudioFlamingo3Attention(small_config())).double()
    x = torch.randn(1, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([True, True, True, True, False, False])
    expected = plain_attention(x[0], attention, heads=2, num_keys=4)
    assert is_close(attention(x, mask[None, None, None])[0], expected)


def test_in_encoder_and_projector_only_keys_and_positions_have_no_bias(model):
    without_bias = set()
    for part in (model.audio_tower, model.multi_modal_projector):
        names = {name for name, _ in part.named_parameters()}
        for name in names:
            if name.replace(".weight", ".bias") not in names:
                without_bias.add(name.split(".")[-2])
    assert without_bias == {"k_proj", "embed_positions"}


@torch.no_grad()
def test_in_bfloat16_the_scaled_queries_are_rounded_before_the_product_with_the_keys():
    # One head of 8 channels. Whatever the frames, the query is the bias. Window i has two frames:
    # a zero, with key and value 0, and the i-th unit vector, with key e[i] and value 1. So the
    # scores are 0 and s = scaled query[i], and the result is e^s / (1 + e^s). For s of -33 or
    # less, its logarithm is s. bfloat16 rounds such an s to a multiple of 0.25.
    attention = AudioFlamingo3Attention(small_config(heads=1)).bfloat16()
    for weight in attention.parameters():
        weight.zero_()
    query = attention.q_proj.bias.copy_(torch.linspace(-95, -170, 8))
    attention.k_proj.weight.copy_(torch.eye(8))
    attention.v_proj.weight.fill_(1.0)
    attention.out_proj.weight.copy_(torch.eye(8))
    x = torch.stack([torch.zeros(8, 8), torch.eye(8)], dim=1).bfloat16()  # (8 windows, 2, 8)
    result = attention(x, torch.ones(8, 1, 1, 2, dtype=torch.bool))
    scaled = query * 8**-0.5  # in bfloat16, so it is rounded
    assert is_close(result[:, 0, 0].float().log(), scaled.float(), limit=0.01)


def test_a_layer_adds_attention_then_a_feed_forward_network_to_frames_it_normalizes(encoder):
    module = encoder(layers=2)
    features, mask = windows(12)
    assert is_close(module(features, mask)[0], plain_encoder(features[0], module, conv_frames=6))


@torch.no_grad()
def test_the_layers_normalize_with_an_eps_of_1e_5(encoder):
    module = encoder(layers=1)  # made so small that the eps of `plain_layer_norm` shows
    for layer in (module.conv1, module.conv2):
        layer.weight.mul_(1e-3)
        layer.bias.mul_(1e-3)
    module.embed_positions.weight.mul_(1e-3)
    features, mask = windows(12)
    assert is_close(module(features, mask)[0], plain_encoder(features[0], module, conv_frames=6))


# ---- Pool ----


def test_two_conv_frames_are_averaged_before_the_last_layer_norm_and_not_after(encode_frames):
    ones = torch.tensor([1.0, -1.0] * 4, dtype=torch.float64)
    x = encode_frames(torch.stack([ones, -0.9 * ones, ones, ones, ones, ones]))
    assert is_close(x[0], 0.998 * ones, limit=1e-3)  # after: (1 - 1) / 2 = 0


def test_the_last_layer_norm_has_an_eps_of_1e_5(encode_frames):
    ones = torch.tensor([1.0, -1.0] * 4, dtype=torch.float64)
    x = encode_frames(0.003 * ones.expand(6, 8))
    assert is_close(x[0], 0.003 / math.sqrt(0.003**2 + 1e-5) * ones)


def test_an_odd_last_conv_frame_is_a_key_but_the_pool_drops_it(encoder):
    module = encoder(layers=2)
    features, mask = windows(9)  # 5 conv frames, so 2 audio frames
    expected = plain_encoder(features[0], module, conv_frames=5)
    assert is_close(module(features, mask)[0, :2], expected)


# ---- Windows ----


def test_a_shorter_window_is_encoded_as_if_it_were_alone(encoder):
    module = encoder(layers=2)
    features, mask = windows(12, 7, 4)
    frames = module(features, mask)
    assert is_close(frames[1, :2], plain_encoder(features[1], module, conv_frames=4))
    assert is_close(frames[2, :1], plain_encoder(features[2], module, conv_frames=2))


def test_of_7_real_mel_frames_the_last_is_seen_with_two_more_and_none_after(encoder):
    module = encoder(layers=1)
    features, mask = windows(7)
    frames = module(features, mask)[0, :2]
    for mel_frame, is_seen in [(6, True), (7, True), (8, True), (9, False), (11, False)]:
        changed = features.clone()
        changed[0, :, mel_frame] += 1
        assert torch.equal(module(changed, mask)[0, :2], frames) != is_seen


@pytest.mark.differs("transformers always computes all 750 frames")
def test_the_encoder_stops_at_the_longest_window(encoder):
    module = encoder(layers=1)
    lengths = []
    module.conv1.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[-1]))
    frames = module(*windows(4, 9, 2))
    assert lengths == [11]  # 9 real mel frames and the two that the last conv frame sees
    assert frames.shape == (3, 2, 8)


def test_only_real_audio_frames_are_projected_window_after_window(model):
    features, mask = official_windows(9, 2, 101, 4)  # 2, 0, 25 and 1 audio frames
    frames = model.get_audio_features(features, mask)
    alone = [
        model.get_audio_features(features[window : window + 1], mask[window : window + 1])
        for window in (0, 2, 3)
    ]
    assert frames.shape == (28, 48)
    assert is_close(frames, torch.cat(alone), limit=1e-5)


@pytest.mark.differs("transformers encodes all windows at once")
def test_windows_are_encoded_eight_at_a_time_in_order(model):
    batches = []
    hook = model.audio_tower.register_forward_hook(
        lambda module, inputs, frames: batches.append(frames)
    )
    frames = model.get_audio_features(*official_windows(*[4] * 17))
    hook.remove()
    assert [len(batch) for batch in batches] == [8, 8, 1]
    together = model.audio_tower(*official_windows(*[4] * 17))
    assert is_close(torch.cat(batches), together, limit=1e-5)
    assert is_close(frames, model.multi_modal_projector(together[:, 0]), limit=1e-5)


def test_the_ninth_window_has_a_mask_of_its_own(model):
    features, mask = official_windows(*[4] * 8, 101)  # 1 audio frame each, then 25
    frames = model.get_audio_features(features, mask)
    assert frames.shape == (33, 48)
    assert is_close(frames[8:], model.get_audio_features(features[8:], mask[8:]), limit=1e-5)


@pytest.mark.differs("transformers refuses float32 features in a bfloat16 model")
def test_float32_features_reach_a_bfloat16_model(model):
    bfloat16_model = copy.deepcopy(model).bfloat16()
    features, mask = official_windows(9)
    frames = bfloat16_model.get_audio_features(features, mask)
    assert frames.dtype == torch.bfloat16
    assert torch.equal(frames, bfloat16_model.get_audio_features(features.bfloat16(), mask))


# ---- Projector ----


def test_the_projector_is_linear_exact_gelu_linear(randomized, tiny_config):
    projector = randomized(AudioFlamingo3MultiModalProjector(tiny_config())).double()
    frames = torch.randn(4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hidden = plain_gelu(plain_linear(frames, projector.linear_1))
    assert is_close(projector(frames), plain_linear(hidden, projector.linear_2))
    assert projector(frames).shape == (4, 48)
