"""Audio Flamingo 3, the network: token ids and log-mel windows in, new token ids out.

The sections follow a recording to the first word of the answer:

    Configuration   the sizes of the official model
    Frame counts    the number of frames of a window at each stage
    Encoder         log-mel windows -> audio frames
    Projector       audio frames -> the decoder's width
    Splice          audio frames -> the <sound> positions of the prompt
    Decoder         embeddings -> hidden states, with a key-value cache
    Next token      logits -> one new id for each row
    Whole model     audio features, prefill, decoding, loss, generation, loading

Its parts come from models that you may know. What differs from each of them:

    Whisper large-v3  The encoder has Whisper's 32 layers. Then an average pool halves the
                      frames, from 20 ms each to 40 ms, and the last LayerNorm follows.
                      Whisper attends to padding; here it is masked.
    Qwen2-Audio       It has the same encoder and pool. Its projector is one linear layer,
                      and a recording is one window of 30 s. Here it is two layers, and a
                      recording has up to 20 windows, whose frames are joined.
    Qwen2.5-7B        The decoder is the same, with a few added tokens. One is <sound>: in
                      the prompt, each <sound> is replaced by one audio frame.

Letters in shapes: B rows of a batch, T tokens, W windows, C conv frames, A audio frames of
a window, N audio frames of all windows, H hidden size, D head size, V vocabulary size.
Modules are named as the tensors in nvidia/audio-flamingo-3-hf.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Checks, files, conventions of transformers: not part of the model.
from plumbing.check_inputs import (
    check_finite,
    check_generation_options,
    check_room,
    prepare_inputs,
    separate_options,
)
from plumbing.devices import choose_device, choose_dtype, shapes_without_memory
from plumbing.find_checkpoint import find_checkpoint
from plumbing.json_file import errors_naming, from_known_keys
from plumbing.prompt_parts import split_prompt
from plumbing.transformers_conventions import CausalOutput, PretrainedModel, as_in_transformers


# ---- Configuration: fields of config.json, with the values of Audio Flamingo 3 ----
@dataclass
class AudioFlamingo3EncoderConfig:
    num_mel_bins: int = 128  # rows of the log-mel spectrogram
    hidden_size: int = 1280  # channels of a frame
    num_hidden_layers: int = 32
    num_attention_heads: int = 20  # of 64 channels each
    intermediate_size: int = 5120  # channels inside the feed-forward layers
    max_source_positions: int = 1500  # conv frames of a 30 s window


@dataclass
class Qwen2Config:
    vocab_size: int = 151672  # with added tokens, such as <sound>
    hidden_size: int = 3584  # channels of a token
    intermediate_size: int = 18944  # channels inside the feed-forward layers
    num_hidden_layers: int = 28
    num_attention_heads: int = 28  # query heads of 128 channels each
    num_key_value_heads: int = 4  # each is shared by 7 query heads
    max_position_embeddings: int = 32768  # maximum number of tokens
    rms_norm_eps: float = 1e-6  # avoids division by zero in RMSNorm
    rope_theta: float = 1_000_000.0  # base of the rotary position embedding

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass
class AudioFlamingo3Config:
    audio_config: AudioFlamingo3EncoderConfig = field(default_factory=AudioFlamingo3EncoderConfig)
    text_config: Qwen2Config = field(default_factory=Qwen2Config)
    audio_token_id: int = 151669  # <sound>
    num_tokens: int | None = None  # ids with a text; None: all
    rotary_time_config: object = None  # for its siblings; see extras/music_flamingo.py


# ---- Frame counts ----
POOL_SIZE = 2  # conv frames in an audio frame


def frame_counts(mel_frames):
    """How many conv frames and audio frames a window with so many real mel frames has.

    Takes and returns ints or integer tensors. A full window: 3000 -> (1500, 750).
    """
    num_conv_frames = (mel_frames + 1) // 2  # conv2, stride 2: rounds up
    num_audio_frames = num_conv_frames // POOL_SIZE  # average pool: rounds down
    return num_conv_frames, num_audio_frames


# ---- Encoder: log-mel windows -> audio frames ----
def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(B, T, heads x D) -> (B, heads, T, D). The width of x gives the number of heads."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


class AudioFlamingo3Attention(nn.Module):
    def __init__(self, config: AudioFlamingo3EncoderConfig):
        super().__init__()
        hidden_size = config.hidden_size
        self.head_dim = hidden_size // config.num_attention_heads
        # A bias would add the same to all scores of a query, which softmax cancels.
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        # The queries are scaled, not the scores, as in transformers. For the official head
        # size, 64, it makes no difference: the factor is 1/8, which rounds nothing.
        q = split_heads(self.q_proj(x), self.head_dim) * self.head_dim**-0.5  # (W, heads, C, D)
        k = split_heads(self.k_proj(x), self.head_dim)
        v = split_heads(self.v_proj(x), self.head_dim)
        # softmax(q @ k.transpose(-2, -1)) @ v, without the keys whose mask is False
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class AudioFlamingo3EncoderLayer(nn.Module):
    def __init__(self, config: AudioFlamingo3EncoderConfig):
        super().__init__()
        self.self_attn = AudioFlamingo3Attention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)  # comes before fc1

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x), mask)
        x = x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))
        return x


class AudioFlamingo3Encoder(nn.Module):
    def __init__(self, config: AudioFlamingo3EncoderConfig):
        super().__init__()
        hidden_size = config.hidden_size
        self.conv1 = nn.Conv1d(config.num_mel_bins, hidden_size, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(hidden_size, hidden_size, kernel_size=3, stride=2, padding=1)
        # Whisper's sinusoids, read from the checkpoint.
        self.embed_positions = nn.Embedding(config.max_source_positions, hidden_size)
        self.layers = nn.ModuleList(
            AudioFlamingo3EncoderLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.layer_norm = nn.LayerNorm(hidden_size)

    def forward(self, input_features: Tensor, feature_attention_mask: Tensor) -> Tensor:
        """Audio frames (W, A, H); A is that of the longest window.

        input_features: (W, mel bins, mel frames), any dtype.
        feature_attention_mask: (W, mel frames), 1 on real mel frames, then 0.
        """
        num_conv_frames, _ = frame_counts(feature_attention_mask.sum(-1))  # (W,)
        longest = int(num_conv_frames.max())

        # Whisper always encodes 3000 mel frames. Stopping at the last real conv frame makes
        # this 7 to 10 times as fast for a 5 s clip. The rest would be masked.
        # Conv frame c depends on mel frames 2c - 2 to 2c + 2.
        last_mel_frame = 2 * (longest - 1) + 2
        x = input_features[:, :, : last_mel_frame + 1].to(self.conv1.weight.dtype)
        x = F.gelu(self.conv1(x))
        x = F.gelu(self.conv2(x))[:, :, :longest]
        x = x.transpose(1, 2)  # (W, C, H)
        x = x + self.embed_positions.weight[:longest]

        # Shorter windows end in padding, which no query may see.
        is_real = torch.arange(longest, device=x.device) < num_conv_frames[:, None]  # (W, C)
        mask = is_real[:, None, None]  # (W, 1, 1, C), the same for all heads and queries
        for layer in self.layers:
            x = layer(x, mask)

        # An odd last conv frame was a key in attention, but the pool drops it.
        x = x[:, : longest // POOL_SIZE * POOL_SIZE]
        pairs = x.unflatten(1, (-1, POOL_SIZE))  # (W, A, 2, H)
        return self.layer_norm(pairs.mean(2))


# ---- Projector: audio frames -> the decoder's width ----
class AudioFlamingo3MultiModalProjector(nn.Module):
    def __init__(self, config: AudioFlamingo3Config):
        super().__init__()
        text_size = config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.audio_config.hidden_size, text_size)
        self.linear_2 = nn.Linear(text_size, text_size)

    def forward(self, frames: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(frames)))


# ---- Splice: audio frames -> the <sound> positions of the prompt ----
def splice(x: Tensor, is_sound: Tensor, audio_frames: Tensor | None) -> Tensor:
    """Embeddings x (B, T, H), with the next audio frame wherever is_sound (B, T) is True.

    audio_frames: (N, H), row after row. The length T stays the same.
    """
    num_tokens = int(is_sound.sum())
    num_frames = 0 if audio_frames is None else len(audio_frames)
    if num_tokens != num_frames:
        raise ValueError(
            f"Audio tokens and features mismatch: tokens={num_tokens}, frames={num_frames}. "
            "Pass the processor's input_ids together with its input_features."
        )
    if audio_frames is None:
        return x
    return x.masked_scatter(is_sound[..., None], audio_frames.to(x.dtype))


# ---- Decoder: embeddings -> hidden states ----
class KeyValueCache:
    """The keys and values of all tokens read so far, in every layer, for `capacity` tokens.

    They never change, as no token sees a later one. A cache belongs to one call of
    `generate`, or to one conversation. Shorter prompts are padded on the right; see
    `prefill`. On this padding, `is_real` is False: no token attends to it.
    """

    def __init__(self, config: Qwen2Config, rows: int, capacity: int, dtype, device):
        shape = (rows, config.num_key_value_heads, capacity, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self.is_real = torch.zeros(rows, capacity, dtype=torch.bool, device=device)
        self.capacity = capacity
        self.length = 0  # tokens so far, padding included

    def extend(self, is_real: Tensor) -> Tensor:
        """Adds T tokens, is_real (B, T). Returns which are real of all, (B, length)."""
        start = self.length
        self.length += is_real.shape[1]
        self.is_real[:, start : self.length] = is_real
        return self.is_real[:, : self.length]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores keys and values (B, heads, T, D) where `extend` made room; returns all."""
        start = self.length - k.shape[2]
        self.keys[layer][:, :, start : self.length] = k
        self.values[layer][:, :, start : self.length] = v
        return self.keys[layer][:, :, : self.length], self.values[layer][:, :, : self.length]


def rotary_tables(positions: Tensor, head_dim: int, base: float, dtype: torch.dtype):
    """cos and sin (B, 1, T, D) for positions (B, T), computed in float32."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    frequencies = 1.0 / base**exponents  # (D / 2,)
    angles = positions[:, None, :, None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate_half(x: Tensor) -> Tensor:
    """(a, b) -> (-b, a), where a and b are the two halves of the channels.

    So x * cos + rotate_half(x) * sin rotates channel pairs (i, i + D / 2).
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def causal_mask(is_real: Tensor, tokens: int) -> Tensor:
    """(B, 1, T, length): whether one of the last T tokens may attend to one of all tokens.

    is_real (B, length): False on padding.
    """
    places = torch.arange(is_real.shape[1], device=is_real.device)  # in the cache
    is_before = places <= places[-tokens:, None]  # (T, length)
    return (is_real[:, None] & is_before)[:, None]


class Qwen2RMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # As in Qwen2, cast back before multiplying by the weight. F.rms_norm casts after.
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


class Qwen2Attention(nn.Module):
    def __init__(self, config: Qwen2Config, layer: int):
        super().__init__()
        self.layer = layer  # index of this layer in the cache
        self.head_dim = config.head_dim
        query_size = config.num_attention_heads * config.head_dim
        key_value_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)

    def forward(self, x, cos, sin, mask, cache):
        """x (B, T, H). cos, sin: see `rotary_tables`. mask: see `causal_mask`."""
        q = split_heads(self.q_proj(x), self.head_dim)  # (B, query heads, T, D)
        k = split_heads(self.k_proj(x), self.head_dim)  # (B, key-value heads, T, D)
        v = split_heads(self.v_proj(x), self.head_dim)
        q = q * cos + rotate_half(q) * sin
        k = k * cos + rotate_half(k) * sin
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        x = self.attend(q, k, v, mask)
        return self.o_proj(x.transpose(1, 2).flatten(2))

    def attend(self, q, k, v, mask):  # extras/long_prompts.py has a faster one
        if q.shape[2] == 1:
            return attend_one_token(q, k, v, mask)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )


def attend_one_token(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of one query per head to all keys, which are read only once.

    28 heads with one query, (B, 28, 1, D), are viewed as 4 heads with 7 queries,
    (B, 4, 7, D). enable_gqa=True would read or even copy each key and value 7 times.
    After ten minutes of audio, it takes a third of the time on a CPU.
    """
    batch, query_heads, _, head_dim = q.shape
    grouped = q.view(batch, k.shape[1], -1, head_dim)  # (B, key-value heads, queries, D)
    x = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask)
    return x.reshape(batch, query_heads, 1, head_dim)


class Qwen2MLP(nn.Module):
    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Qwen2DecoderLayer(nn.Module):
    def __init__(self, config: Qwen2Config, layer: int):
        super().__init__()
        self.self_attn = Qwen2Attention(config, layer)
        self.mlp = Qwen2MLP(config)
        self.input_layernorm = Qwen2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Qwen2RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, cos, sin, mask, cache):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class Qwen2Model(nn.Module):
    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Qwen2DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = Qwen2RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, is_real: Tensor, cache: KeyValueCache | None) -> Tensor:
        """Hidden states (B, T, H) of embeddings x that follow those in the cache.

        is_real: (B, T), False on padding, which must be on the right of x.
        """
        tokens = x.shape[1]
        past = 0 if cache is None else cache.length
        positions = torch.arange(tokens, device=x.device)[None]  # (1, T)
        mask = None  # plain causal attention: padding is on the right, so not seen
        if cache is not None:
            all_real = cache.extend(is_real)  # (B, past + T)
        if past > 0:  # the answer, a later turn, or a later part of a long prompt
            positions = all_real[:, :past].sum(-1, keepdim=True) + positions  # skip padding
            if tokens > 1 or not all_real.all():  # else the one token sees everything
                mask = causal_mask(all_real, tokens)
        cos, sin = rotary_tables(positions, self.config.head_dim, self.config.rope_theta, x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, mask, cache)
        return self.norm(x)


class Qwen2ForCausalLM(nn.Module):
    def __init__(self, config: Qwen2Config):
        super().__init__()  # no forward: the whole model calls the two modules apart
        self.model = Qwen2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


# ---- Next token: logits -> one new id for each row ----
@dataclass
class GenerationConfig:
    """The options of `generate`, named as in generation_config.json."""

    max_new_tokens: int = 512
    do_sample: bool = False  # False: greedy, always the likeliest token
    temperature: float = 1.0
    top_k: int | None = 50  # None or 0: no limit
    top_p: float | None = None  # None: no limit
    repetition_penalty: float = 1.0
    eos_token_id: int | list[int] = field(default_factory=list)  # []: never stop early
    pad_token_id: int = 0  # follows the end of a row

    def __post_init__(self):
        check_generation_options(vars(self))


def next_token(logits: Tensor, options: GenerationConfig) -> Tensor:
    """The next ids (B,), from float32 logits (B, V)."""
    if not options.do_sample:
        return logits.argmax(-1)

    logits = logits / options.temperature
    probabilities, ids = logits.softmax(-1).sort(descending=True)
    if options.top_k:
        probabilities[:, options.top_k :] = 0
    if options.top_p is not None:
        # Keep the fewest ids whose probabilities sum to top_p: drop an id if the likelier
        # ones reach that sum already. What top-k has dropped is not in the sum.
        probabilities /= probabilities.sum(-1, keepdim=True)
        of_likelier_ids = probabilities.cumsum(-1) - probabilities
        probabilities[of_likelier_ids >= options.top_p] = 0
    drawn = torch.multinomial(probabilities, num_samples=1)  # (B, 1)
    return ids.gather(1, drawn)[:, 0]


def penalize_repetition(logits: Tensor, seen_ids: Tensor, penalty: float) -> Tensor:
    """Logits (B, V) that are lower for the ids a row has already, seen_ids (B, S)."""
    seen = logits.gather(1, seen_ids)
    penalized = torch.where(seen < 0, seen * penalty, seen / penalty)
    return logits.scatter(1, seen_ids, penalized)


# ---- Whole model ----
class AudioFlamingo3ForConditionalGeneration(PretrainedModel):
    def __init__(self, config: AudioFlamingo3Config):
        from extras.music_flamingo import rotary_time_embedding  # only the siblings need it

        super().__init__()
        self.config = config
        self.generation_config = GenerationConfig()
        self.audio_tower = AudioFlamingo3Encoder(config.audio_config)
        self.multi_modal_projector = AudioFlamingo3MultiModalProjector(config)
        self.language_model = Qwen2ForCausalLM(config.text_config)
        self.rotary_time = rotary_time_embedding(config)  # None in Audio Flamingo 3

    def get_audio_features(self, input_features, feature_attention_mask, window_index=None):
        """The real audio frames of all windows, projected, in order: (N, text H).

        input_features: (W, mel bins, mel frames). feature_attention_mask: (W, mel frames).
        """
        frames = []
        for start in range(0, len(input_features), 8):  # limits the memory
            batch = slice(start, start + 8)
            mask = feature_attention_mask[batch]
            x = self.audio_tower(input_features[batch], mask)  # (W, A, audio H)
            if self.rotary_time is not None:
                x = self.rotary_time(x, window_index, batch)
            _, num_audio_frames = frame_counts(mask.sum(-1))  # (W,)
            is_real = torch.arange(x.shape[1], device=x.device) < num_audio_frames[:, None]
            frames.append(self.multi_modal_projector(x[is_real]))
        return torch.cat(frames)

    def embed(self, input_ids: Tensor, **audio: Tensor) -> Tensor:
        """Embeddings (B, T, H) of a prompt, with audio frames in the place of <sound>."""
        audio_frames = self.get_audio_features(**audio) if audio else None
        x = self.language_model.model.embed_tokens(input_ids)
        return splice(x, input_ids == self.config.audio_token_id, audio_frames)

    def prefill(self, input_ids, attention_mask, cache=None, **audio) -> Tensor:
        """Hidden states (B, T, H) of a prompt; its keys and values are added to the cache.

        attention_mask: (B, T) bool, False on padding, on either side.
        """
        x = self.embed(input_ids, **audio)

        # Move padding to the right, where causal attention never looks. On the left, it
        # would need a mask of T x T. Without padding, nothing moves.
        to_right = (~attention_mask).int().argsort(dim=1, stable=True)  # MPS cannot sort bool
        rows = torch.arange(len(x), device=x.device)[:, None]
        x = x[rows, to_right]
        attention_mask = attention_mask[rows, to_right]

        # To limit memory: 4096 tokens, then 1024 at a time, because these need a mask.
        states = []
        for part, is_real in split_prompt(x, attention_mask, cache):
            states.append(self.language_model.model(part, is_real, cache))
        states = torch.cat(states, dim=1)
        return torch.empty_like(x).index_put_((rows, to_right), states)  # moved back

    def decode_one_token(self, token_ids: Tensor, cache: KeyValueCache) -> Tensor:
        """Logits (B, V) after one more id in each row, (B,)."""
        x = self.language_model.model.embed_tokens(token_ids[:, None])
        is_real = torch.ones_like(token_ids[:, None], dtype=torch.bool)
        x = self.language_model.model(x, is_real, cache)
        return self.language_model.lm_head(x[:, 0])

    def forward(self, input_ids, attention_mask=None, labels=None, **audio) -> CausalOutput:
        """Logits, and the loss if there are labels (B, T).

        input_ids, attention_mask: (B, T), padded on either side.
        audio: the windows of all rows, in order; see `get_audio_features`.
        loss: mean cross-entropy of the labels that are not -100, in float32.
        """
        attention_mask, audio = prepare_inputs(input_ids, attention_mask, audio)
        x = self.prefill(input_ids, attention_mask, **audio)
        logits = self.language_model.lm_head(x)
        loss = None
        if labels is not None:
            predictions = logits[:, :-1].float().flatten(0, 1)
            # Padding need not predict the first real token.
            targets = labels[:, 1:].masked_fill(~attention_mask[:, :-1], -100).flatten()
            loss = F.cross_entropy(predictions, targets, ignore_index=-100)
        return CausalOutput(logits, loss)

    @torch.inference_mode()
    def stream(
        self, input_ids, attention_mask=None, cache=None, past_ids=None, **audio_and_options
    ) -> Iterator[Tensor]:
        """The new ids (B,) of each step, as soon as they are known.

        Options are the fields of `GenerationConfig`; those not given are the checkpoint's.
        A conversation continues with its `cache` and the `past_ids` (B, P) in it.
        """
        audio, options = separate_options(audio_and_options, self.generation_config)
        attention_mask, audio = prepare_inputs(input_ids, attention_mask, audio)
        check_room(input_ids, options.max_new_tokens, self.config.text_config, cache)
        if cache is None:
            cache = self.new_cache(len(input_ids), input_ids.shape[1] + options.max_new_tokens)

        # Prefill: the last real token of each row predicts the first new one.
        x = self.prefill(input_ids, attention_mask, cache, **audio)
        last = attention_mask.cumsum(1).argmax(1, keepdim=True)  # (B, 1): where the count ends
        x = x.take_along_dim(last[..., None], dim=1)[:, 0]  # (B, H)
        logits = self.language_model.lm_head(x)  # (B, V)
        check_finite(logits, self)

        # For the repetition penalty: a row's ids, with the last one for padding.
        seen_ids = [input_ids.where(attention_mask, input_ids.gather(1, last))]
        if past_ids is not None:
            seen_ids.append(past_ids)
        end_ids = torch.tensor(options.eos_token_id, dtype=torch.long, device=x.device)
        ended = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        # Decode: choose an id, yield it, and read it for the next logits.
        for step in range(1, options.max_new_tokens + 1):
            logits = logits.float()
            if options.repetition_penalty != 1:
                seen = torch.cat(seen_ids, dim=1)
                logits = penalize_repetition(logits, seen, options.repetition_penalty)
            token_ids = next_token(logits[:, : self.config.num_tokens], options)
            token_ids = token_ids.masked_fill(ended, options.pad_token_id)
            yield token_ids
            seen_ids.append(token_ids[:, None])
            ended |= torch.isin(token_ids, end_ids)
            if ended.all() or step == options.max_new_tokens:
                return
            logits = self.decode_one_token(token_ids, cache)

    def generate(self, input_ids, attention_mask=None, **others) -> Tensor:
        """(B, T + new) ids: the prompt, then the new ones. Arguments: see `stream`."""
        new_ids = list(self.stream(input_ids, attention_mask, **others))
        return torch.cat([input_ids, torch.stack(new_ids, dim=1)], dim=1)

    def new_cache(self, rows: int, capacity: int) -> KeyValueCache:
        return KeyValueCache(self.config.text_config, rows, capacity, self.dtype, self.device)

    @classmethod
    @as_in_transformers
    def from_pretrained(cls, path, device_map="auto", dtype="auto"):
        """The model of a checkpoint directory or a hub name.

        device_map: "auto" (CUDA, else MPS, else CPU) or a device.
        dtype: "auto" (the checkpoint's), a torch.dtype or its name.
        """
        import load_weights  # a model can be built without a checkpoint

        device = choose_device(device_map)
        folder = find_checkpoint(path)
        config, options = load_weights.read_configs(folder)
        with shapes_without_memory():
            model = cls(from_known_keys(AudioFlamingo3Config, config))
        model.generation_config = from_known_keys(GenerationConfig, options)
        with errors_naming(folder):
            model.load_state_dict(dict(load_weights.read_tensors(folder)), assign=True)
        return model.to(device, choose_dtype(dtype, model.dtype)).eval()


MusicFlamingoForConditionalGeneration = AudioFlamingo3ForConditionalGeneration  # its siblings
