"""Audio Flamingo 3, the network: token ids and log-mel windows in, logits or new token ids out.

The sections follow a recording on its way to the first word of the answer:

    Configuration     the sizes of the official model
    Frame counts      how many frames a window has at each stage
    Encoder           log-mel windows -> audio frames
    Rotary time       audio frames that know when they were heard; not in Audio Flamingo 3
    Projector         audio frames -> the decoder's width
    Decoder           embeddings -> hidden states, with a key-value cache
    Next token        logits -> one new id for each row
    Whole model       splice, prefill, decode, loss, generation
    Checks            what bad input gets

Audio Flamingo 3 is put together from parts that you may know. What differs from each of them:

    Whisper large-v3  The encoder is Whisper's, all 32 layers of it. Then an average pool halves
                      the frames, from 20 ms to 40 ms, and the LayerNorm comes after the pool.
                      Padding at the end of a window is masked; Whisper attends to it.
    Qwen2-Audio       Has the same encoder and pool. Its projector is one linear layer; here there
                      are two with a GELU between. It hears one window of 30 s; here a recording
                      is cut into up to 20 windows, whose frames follow each other directly.
    Qwen2-7B          The decoder is Qwen2's without a change, but for a few added tokens, such as
                      <sound>. Each <sound> in the prompt is replaced by one audio frame.

Music Flamingo 2601 and Audio Flamingo Next, its newer siblings (model_type musicflamingo), have the
same tensors. Between encoder and projector they have one step more, the rotary time embedding.

Letters in shapes: B rows of a batch, T tokens, W windows, C conv frames, A audio frames,
H hidden size, D size of an attention head, V vocabulary.
Modules are named as the tensors of nvidia/audio-flamingo-3-hf are, so `load_state_dict` finds
them; load_weights.py renames those of the other published layout.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---- Configuration: the fields of config.json, with the values of Audio Flamingo 3 ----


@dataclass
class AudioFlamingo3EncoderConfig:
    num_mel_bins: int = 128  # rows of the log-mel spectrogram
    hidden_size: int = 1280  # channels of a frame
    num_hidden_layers: int = 32  # transformer layers
    num_attention_heads: int = 20  # of 64 channels each
    intermediate_size: int = 5120  # channels inside the feed-forward layers
    max_source_positions: int = 1500  # conv frames of a 30 s window, one every 20 ms


@dataclass
class Qwen2Config:
    vocab_size: int = 151672  # Qwen2's tokens and Audio Flamingo 3's own, such as <sound>
    hidden_size: int = 3584  # channels of a token
    intermediate_size: int = 18944  # channels inside the feed-forward layers
    num_hidden_layers: int = 28  # transformer layers
    num_attention_heads: int = 28  # query heads of 128 channels each
    num_key_value_heads: int = 4  # each is shared by 7 query heads
    max_position_embeddings: int = 32768  # longest prompt and answer together, in tokens
    rms_norm_eps: float = 1e-6  # added to the mean square, which may be zero
    rope_theta: float = 1_000_000.0  # base of the rotary position embedding

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass
class RotaryTimeConfig:
    """Of Music Flamingo and Audio Flamingo Next; the names are those of config.json's top level."""

    rope_theta: float = 1200.0  # base of the frequencies; also the positions in a full turn
    partial_rotary_factor: float = 0.2  # 256 angles for 1280 channels; each rotates two channels
    audio_frame_step: float = 0.01  # seconds from one mel frame to the next


@dataclass
class AudioFlamingo3Config:
    audio_config: AudioFlamingo3EncoderConfig = field(default_factory=AudioFlamingo3EncoderConfig)
    text_config: Qwen2Config = field(default_factory=Qwen2Config)
    audio_token_id: int = 151669  # <sound>
    rotary_time_config: RotaryTimeConfig | None = None  # Audio Flamingo 3 has none

    @classmethod
    def from_dict(cls, config: dict) -> "AudioFlamingo3Config":
        """From the plain dictionaries of `load_weights.read_config`."""
        rotary_time_config = None
        if config["rotary_time_config"] is not None:
            rotary_time_config = from_known_keys(RotaryTimeConfig, config["rotary_time_config"])
        return cls(
            audio_config=from_known_keys(AudioFlamingo3EncoderConfig, config["audio_config"]),
            text_config=from_known_keys(Qwen2Config, config["text_config"]),
            audio_token_id=config["audio_token_id"],
            rotary_time_config=rotary_time_config,
        )


def from_known_keys(cls: type, values: dict):
    """A dataclass of those values that it has fields for; files hold many others."""
    names = {f.name for f in fields(cls)}
    return cls(**{name: value for name, value in values.items() if name in names})


# ---- Frame counts ----


def frame_counts(mel_frames):
    """Conv frames and audio frames of a window with `mel_frames` mel frames of real samples.

    Takes and gives ints or integer tensors. A full window: 3000 -> (1500, 750).
    """
    conv_frames = (mel_frames - 1) // 2 + 1  # conv2: kernel 3, stride 2, padding 1
    audio_frames = (conv_frames - 2) // 2 + 1  # the pool; an odd last conv frame is dropped
    return conv_frames, audio_frames


# ---- Encoder: log-mel windows -> audio frames ----


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(B, T, heads x D) -> (B, heads, T, D). The width of x says how many heads there are."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


class AudioFlamingo3Attention(nn.Module):
    def __init__(self, config: AudioFlamingo3EncoderConfig):
        super().__init__()
        hidden_size = config.hidden_size
        self.head_dim = hidden_size // config.num_attention_heads
        # A bias on the keys would add the same to all scores of a query, and softmax cancels that.
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        # Scaled before the product, not after it: in bfloat16 the order shows. (OpenAI's Whisper
        # scales q and k by D**-0.25 each; this is the form that the model was trained in.)
        q = self.q_proj(x) * self.head_dim**-0.5
        q = split_heads(q, self.head_dim)  # (W, heads, C, D)
        k = split_heads(self.k_proj(x), self.head_dim)
        v = split_heads(self.v_proj(x), self.head_dim)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class AudioFlamingo3EncoderLayer(nn.Module):
    def __init__(self, config: AudioFlamingo3EncoderConfig):
        super().__init__()
        self.self_attn = AudioFlamingo3Attention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x), mask)
        x = x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))
        return x


class AudioFlamingo3Encoder(nn.Module):
    def __init__(self, config: AudioFlamingo3EncoderConfig):
        super().__init__()
        mel_bins = config.num_mel_bins
        hidden_size = config.hidden_size
        self.conv1 = nn.Conv1d(mel_bins, hidden_size, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(hidden_size, hidden_size, kernel_size=3, stride=2, padding=1)
        self.embed_positions = new_embedding(config.max_source_positions, hidden_size)
        self.layers = nn.ModuleList(
            AudioFlamingo3EncoderLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.layer_norm = nn.LayerNorm(hidden_size)

    def forward(self, input_features: Tensor, feature_attention_mask: Tensor) -> Tensor:
        """Audio frames (W, A, H) of windows, one every 40 ms; A is that of the longest window.

        input_features: (W, mel bins, mel frames) log-mel, cast to the encoder's own dtype.
        feature_attention_mask: (W, mel frames), 1 on frames of real samples, then 0 on padding.
        """
        conv_frames, _ = frame_counts(feature_attention_mask.sum(-1))  # (W,)
        longest = int(conv_frames.max())

        # Whisper encodes all 3000 mel frames. Here only those that real conv frames can see: conv
        # frame c sees mel frames 2c - 2 to 2c + 2, so the last one, longest - 1, needs 0 to
        # 2 * longest. The mask below hides all later conv frames anyway, so the result is the
        # same, and a clip of 5 s is encoded 7 to 10 times as fast.
        x = input_features[:, :, : 2 * longest + 1].to(self.conv1.weight.dtype)
        x = F.gelu(self.conv1(x))
        x = F.gelu(self.conv2(x))[:, :, :longest]
        x = x.transpose(1, 2)  # (W, C, H)
        x = x + self.embed_positions.weight[:longest]

        real = torch.arange(longest, device=x.device) < conv_frames[:, None]  # (W, C)
        mask = real[:, None, None]  # (W, 1, 1, C): every query may look at the real frames
        for layer in self.layers:
            x = layer(x, mask)

        # An odd last conv frame has taken part in attention, but has no partner in the pool.
        pairs = x[:, : longest // 2 * 2].unflatten(1, (-1, 2))  # (W, A, 2, H)
        return self.layer_norm(pairs.mean(2))


def group_by_length(mel_frames: Tensor) -> list[Tensor]:
    """Numbers of the windows to encode together: those of the same length in whole seconds.

    One group of all windows gives the same frames. But then a short window is padded to the
    longest one: a batch of a 3 s and a 30 s recording takes almost twice the time.
    At most 8 windows go together, which bounds the memory for a long recording.
    """
    seconds = mel_frames // 100
    groups = []
    for length in seconds.unique():
        windows = (seconds == length).nonzero()[:, 0]
        groups.extend(windows.split(8))
    return groups


def new_embedding(rows: int, width: int) -> nn.Embedding:
    """An nn.Embedding whose values a checkpoint will set.

    Starts as zeros: PyTorch's own random start takes a second on the "meta" device, on which
    `from_pretrained` builds the model, because it imports the compiler.
    """
    return nn.Embedding.from_pretrained(torch.zeros(rows, width), freeze=False)


# ---- Rotary time: audio frames that know when they were heard ----


class RotaryTimeEmbedding(nn.Module):
    """Rotates pairs of channels of each audio frame by angles made of its time and its place.

    Music Flamingo and Audio Flamingo Next have it, so that their decoder can tell when in a long
    recording something is heard. It has no weights. Of frame k in window w of a recording, at
    t seconds, the d = 256 angles are, for i from 0 to 127 and f[i] = 1200 ** (-i / 128):

        -2 pi t f[i] w / 1200           128 angles that tell windows apart
        -2 pi t f[i] k / 1200 * 2 pi    128 angles that tell frames of a window apart

    So 512 of the 1280 channels are rotated. The factor of 2 pi for frames only is the official
    code's, and so is the product with t.
    """

    def __init__(self, config: RotaryTimeConfig, audio_config: AudioFlamingo3EncoderConfig):
        super().__init__()
        self.base = config.rope_theta
        self.num_angles = int(audio_config.hidden_size * config.partial_rotary_factor)
        self.frame_seconds = config.audio_frame_step * 4  # 0.04: conv2 halves, and so does the pool
        # 750, also for the last window of a recording, which may have fewer.
        self.window_frames = audio_config.max_source_positions // 2

    def forward(self, x: Tensor, window_index: Tensor) -> Tensor:
        """x (W, A, H), rotated; window_index (W,) is 0 for the first window of a recording."""
        # Angles, cos and sin in float32, but the products in float64, as in the official code.
        # MPS has no float64.
        dtype = torch.float32 if x.device.type == "mps" else torch.float64
        angles = self.angles(window_index, x.shape[1])  # (W, A, d)
        cos = angles.cos().to(dtype)
        sin = angles.sin().to(dtype)
        width = 2 * angles.shape[-1]  # the channels from here on stay as they are
        pairs = x[..., :width].to(dtype).unflatten(-1, (-1, 2))  # of neighbours: (W, A, d, 2)
        first, second = pairs.unbind(-1)
        rotated = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return torch.cat([rotated.flatten(-2).to(x.dtype), x[..., width:]], dim=-1)

    def angles(self, window_index: Tensor, audio_frames: int) -> Tensor:
        """Radians (W, A, d).

        They reach tens of thousands, of which float32 keeps two or three decimals. The model was
        trained with just these, so another order of the operations gives another embedding.
        """
        device = window_index.device
        exponents = torch.arange(0, self.num_angles, 2, device=device).float() / self.num_angles
        frequencies = 1.0 / self.base**exponents  # (d / 2,)
        frames = torch.arange(audio_frames, device=device).float()
        starts = window_index[:, None] * self.window_frames * self.frame_seconds  # (W, 1)
        seconds = starts + frames * self.frame_seconds  # (W, A)

        by_window = (window_index[:, None] / self.base) * frequencies  # (W, d / 2)
        by_frame = (frames[:, None] / self.base * (2 * math.pi)) * frequencies  # (A, d / 2)
        by_window, by_frame = torch.broadcast_tensors(by_window[:, None], by_frame[None])
        by_place = torch.cat([by_window, by_frame], dim=-1)  # (W, A, d)
        return by_place * (-seconds * 2 * math.pi)[..., None]


# ---- Projector: audio frames -> the decoder's width ----


class AudioFlamingo3MultiModalProjector(nn.Module):
    def __init__(self, audio_hidden_size: int, text_hidden_size: int):
        super().__init__()
        self.linear_1 = nn.Linear(audio_hidden_size, text_hidden_size)
        self.linear_2 = nn.Linear(text_hidden_size, text_hidden_size)

    def forward(self, frames: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(frames)))


# ---- Decoder: embeddings -> hidden states ----


class KeyValueCache:
    """The keys and values of all tokens read so far, in every layer, for `capacity` tokens.

    It belongs to one call of `generate` or to one conversation. A prompt that is shorter than the
    longest one in its batch is padded on the right (`prefill` sees to that). In the cache this
    padding remains, as a hole between the prompt and the answer: `attention_mask` is False there,
    so it is never looked at and does not count in positions.
    """

    def __init__(self, config: Qwen2Config, rows: int, capacity: int, dtype, device):
        shape = (rows, config.num_key_value_heads, capacity, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self.attention_mask = torch.zeros(rows, capacity, dtype=torch.bool, device=device)
        self.capacity = capacity
        self.length = 0  # tokens read so far

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores keys and values (B, heads, T, D) of new tokens; returns those of all tokens.

        `length` stays as it is: `Qwen2Model.forward` advances it after the last layer.
        """
        end = self.length + k.shape[2]
        self.keys[layer][:, :, self.length : end] = k
        self.values[layer][:, :, self.length : end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def update_mask(self, attention_mask: Tensor) -> Tensor:
        """Stores the mask (B, T) of new tokens; returns that of all tokens."""
        end = self.length + attention_mask.shape[1]
        self.attention_mask[:, self.length : end] = attention_mask
        return self.attention_mask[:, :end]


def rotary_tables(positions: Tensor, head_dim: int, base: float, dtype: torch.dtype):
    """cos and sin (B, 1, T, D) for positions (B, T): angles in float32, then rounded to dtype."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    frequencies = 1.0 / base**exponents  # (D / 2,)
    angles = positions[:, None, :, None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate_half(x: Tensor) -> Tensor:
    """(a, b) -> (-b, a), where a and b are the halves of the channels.

    So x * cos + rotate_half(x) * sin rotates each pair of channels (i, i + D / 2) by its angle.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


class Qwen2RMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # Rounded to the model's dtype before the weight is applied; F.rms_norm rounds after.
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


class Qwen2Attention(nn.Module):
    def __init__(self, config: Qwen2Config, layer: int):
        super().__init__()
        self.layer = layer  # where its keys and values stand in the cache
        self.head_dim = config.head_dim
        query_size = config.num_attention_heads * config.head_dim
        key_value_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)

    def forward(self, x, cos, sin, mask, cache):
        q = split_heads(self.q_proj(x), self.head_dim)  # (B, query heads, T, D)
        k = split_heads(self.k_proj(x), self.head_dim)  # (B, key-value heads, T, D)
        v = split_heads(self.v_proj(x), self.head_dim)
        q = q * cos + rotate_half(q) * sin
        k = k * cos + rotate_half(k) * sin
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        if q.shape[2] == 1:
            x = attend_one_token(q, k, v, mask)
        else:
            causal = mask is None
            x = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True
            )
        return self.o_proj(x.transpose(1, 2).flatten(2))


def attend_one_token(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True) for one query.

    That call copies every key-value head for each query head that shares it. Here nothing is
    copied: 28 heads with one query each, (B, 28, 1, D), are viewed as 4 heads with 7 queries each,
    (B, 4, 7, D). All 7 stand at the same position. In bfloat16 this is ten times as fast; without
    it, a token after ten minutes of audio would take twice the time.
    """
    batch, query_heads, _, head_dim = q.shape
    grouped = q.view(batch, k.shape[1], -1, head_dim)  # (B, key-value heads, queries, D)
    x = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask)
    return x.view(batch, query_heads, 1, head_dim)


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
        self.embed_tokens = new_embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Qwen2DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = Qwen2RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, attention_mask: Tensor, cache: KeyValueCache | None) -> Tensor:
        """Hidden states (B, T, H) of embeddings x (B, T, H) that follow those in the cache.

        attention_mask: (B, T) bool, False on padding, which must stand on the right of x;
        `prefill` moves it there.
        """
        tokens = x.shape[1]
        past = 0
        if cache is not None:
            past = cache.length
            attention_mask = cache.update_mask(attention_mask)  # (B, past + T)

        # A row's positions count its own real tokens.
        positions = attention_mask.cumsum(-1)[:, -tokens:] - 1  # (B, T)
        cos, sin = rotary_tables(positions, self.config.head_dim, self.config.rope_theta, x.dtype)

        # Without a past, plain causal attention is enough: padding stands on the right, where no
        # real token looks. A single token that may look at everything needs no mask either.
        if past == 0 or (tokens == 1 and bool(attention_mask.all())):
            mask = None
        else:
            mask = causal_mask(attention_mask, tokens)

        for layer in self.layers:
            x = layer(x, cos, sin, mask, cache)
        if cache is not None:
            cache.length += tokens
        return self.norm(x)


def causal_mask(attention_mask: Tensor, tokens: int) -> Tensor:
    """(B, 1, T, past + T), True where one of the last T tokens may look at one of all tokens."""
    keys = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    queries = keys[-tokens:, None]
    return (attention_mask[:, None] & (keys <= queries))[:, None]


# ---- Next token: logits -> one new id for each row ----


@dataclass
class GenerationConfig:
    """The options of `generate`, under their names in generation_config.json."""

    max_new_tokens: int = 512
    do_sample: bool = False  # False: greedy, always the likeliest token
    temperature: float = 1.0
    top_k: int | None = None  # None or 0: no limit
    top_p: float | None = None
    repetition_penalty: float = 1.0
    eos_token_id: int | list[int] = field(default_factory=list)  # an empty list never stops early
    pad_token_id: int = 0  # fills a row that has ended

    def __post_init__(self):
        check_generation_options(self)


def next_token(logits: Tensor, seen: Tensor, options: GenerationConfig) -> Tensor:
    """The next ids (B,) from float32 logits (B, V); seen (B, V) is True on ids of the row so far.

    In this order: repetition penalty, temperature, top-k, top-p.
    """
    if options.repetition_penalty != 1:
        penalty = options.repetition_penalty
        penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
        logits = torch.where(seen, penalised, logits)
    if not options.do_sample:
        return logits.argmax(-1)

    logits = logits / options.temperature
    probabilities, ids = logits.softmax(-1).sort(descending=True)
    if options.top_k:
        probabilities[:, options.top_k :] = 0
    if options.top_p is not None:
        # Drop an id when those likelier than it already hold top_p of the total, which is below 1
        # if top-k has dropped some.
        total = probabilities.sum(-1, keepdim=True)
        before = probabilities.cumsum(-1) - probabilities
        probabilities[before >= options.top_p * total] = 0
    drawn = torch.multinomial(probabilities, num_samples=1)  # (B, 1)
    return ids.gather(1, drawn)[:, 0]


def mark_seen(input_ids: Tensor, attention_mask: Tensor, vocab_size: int) -> Tensor:
    """(B, V) bool, True on each row's own ids (B, T), but not on its padding."""
    counts = torch.zeros(len(input_ids), vocab_size, dtype=torch.long, device=input_ids.device)
    return counts.scatter_add(1, input_ids, attention_mask.long()) > 0


# ---- Whole model ----


class AudioFlamingo3ForConditionalGeneration(nn.Module):
    def __init__(self, config: AudioFlamingo3Config):
        super().__init__()
        audio_size = config.audio_config.hidden_size
        text_size = config.text_config.hidden_size
        vocab_size = config.text_config.vocab_size
        self.config = config
        self.generation_config = GenerationConfig()
        self.source_config = {}  # the config.json it was loaded from, in the hub layout
        self.audio_tower = AudioFlamingo3Encoder(config.audio_config)
        self.rotary_time = None
        if config.rotary_time_config is not None:
            self.rotary_time = RotaryTimeEmbedding(config.rotary_time_config, config.audio_config)
        self.multi_modal_projector = AudioFlamingo3MultiModalProjector(audio_size, text_size)
        self.language_model = nn.ModuleDict(
            {
                "model": Qwen2Model(config.text_config),
                "lm_head": nn.Linear(text_size, vocab_size, bias=False),
            }
        )

    @classmethod
    def from_pretrained(
        cls,
        path,
        device_map: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        torch_dtype: str | torch.dtype | None = None,
    ) -> "AudioFlamingo3ForConditionalGeneration":
        """The model of a checkpoint directory in either layout, or of a hub name; for inference.

        device_map: "auto" is CUDA, else MPS, else the CPU. dtype: "auto" is the checkpoint's own,
        else a torch.dtype or its name; torch_dtype is its older name. Raises FileNotFoundError or
        ValueError, naming file, field or tensor; nothing half-loaded is returned.
        """
        import load_weights

        device = choose_device(device_map)
        dtype = torch_dtype or dtype
        folder = load_weights.find_checkpoint(path)
        tokenizer_folder = load_weights.tokenizer_folder(folder)
        token_ids = load_weights.read_token_ids(tokenizer_folder)
        config = load_weights.read_config(folder, token_ids)
        options = load_weights.read_generation_config(tokenizer_folder, token_ids)
        with torch.device("meta"):  # shapes without memory
            model = cls(AudioFlamingo3Config.from_dict(config))
        with load_weights.errors_naming(tokenizer_folder / "generation_config.json"):
            model.generation_config = from_known_keys(GenerationConfig, options)
        if not load_weights.is_original_layout(folder):
            model.source_config = load_weights.read_json(folder / "config.json")
        with load_weights.errors_naming(folder):
            tensors = dict(load_weights.read_tensors(folder))
            model.load_state_dict(tensors, strict=True, assign=True)
            model.to(device, choose_dtype(dtype, model.dtype))
        return model.requires_grad_(False).eval()

    def save_pretrained(self, path) -> None:
        """Writes a checkpoint directory in the hub layout, without the processor's files.

        `from_pretrained` loads it, and so does transformers. Raises OSError or ValueError.
        """
        from plumbing.save_checkpoint import save_model

        save_model(self, path)

    @property
    def device(self) -> torch.device:
        return self.language_model.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.model.embed_tokens.weight.dtype

    def get_audio_features(
        self,
        input_features: Tensor,
        feature_attention_mask: Tensor,
        window_index: Tensor | None = None,
    ) -> Tensor:
        """Projected audio frames (all real ones of all windows, text H), in order."""
        if self.rotary_time is not None:
            check_window_index(window_index, input_features)
        mel_frames = feature_attention_mask.sum(-1)  # (W,)
        _, audio_frames = frame_counts(mel_frames)
        real_frames = {}
        for windows in group_by_length(mel_frames):
            encoded = self.audio_tower(input_features[windows], feature_attention_mask[windows])
            if self.rotary_time is not None:
                encoded = self.rotary_time(encoded, window_index[windows])
            for window, states in zip(windows.tolist(), encoded):
                real_frames[window] = states[: audio_frames[window]]
        in_order = [real_frames[window] for window in range(len(mel_frames))]
        return self.multi_modal_projector(torch.cat(in_order))

    def splice(self, input_ids: Tensor, audio_frames: Tensor | None) -> Tensor:
        """Embeddings (B, T, H); each <sound> id is replaced by the next audio frame."""
        is_sound = input_ids == self.config.audio_token_id  # (B, T)
        check_frame_count(is_sound, audio_frames)
        x = self.language_model.model.embed_tokens(input_ids)
        if audio_frames is None:
            return x
        return x.masked_scatter(is_sound[..., None], audio_frames.to(x.dtype))

    def prefill(
        self,
        input_ids,
        attention_mask,
        input_features=None,
        feature_attention_mask=None,
        window_index=None,
        cache=None,
    ):
        """Hidden states (B, T, H) of a prompt, which may follow what the cache holds.

        Takes the tensors of `forward`, the attention mask as bool, and fills a `KeyValueCache`.
        """
        audio_frames = None
        if input_features is not None:
            audio_frames = self.get_audio_features(
                input_features, feature_attention_mask, window_index
            )
        x = self.splice(input_ids, audio_frames)

        # Padding may stand on either side. It is moved to the right of each row, where causal
        # attention of real tokens never looks. A padding token on the left would have no token to
        # look at itself: the softmax of nothing is NaN, and NaN spreads to real tokens.
        order = attention_mask.argsort(dim=1, descending=True, stable=True)  # (B, T)
        x = x.take_along_dim(order[..., None], dim=1)
        x = self.run_decoder(x, attention_mask.gather(1, order), cache)
        in_given_order = order.argsort(dim=1)  # the inverse of the permutation
        return x.take_along_dim(in_given_order[..., None], dim=1)

    def run_decoder(self, x, attention_mask, cache):
        """The decoder's hidden states; after a past, those of 1024 tokens at a time.

        Tokens that follow others need a mask of T x (past + T), which would be large for a
        recording of several minutes.
        """
        decoder = self.language_model.model
        if cache is None or cache.length == 0:
            return decoder(x, attention_mask, cache)
        states = []
        for part, part_mask in zip(x.split(1024, dim=1), attention_mask.split(1024, dim=1)):
            states.append(decoder(part, part_mask, cache))
        return torch.cat(states, dim=1)

    def decode_one_token(self, token_ids: Tensor, cache: KeyValueCache) -> Tensor:
        """Logits (B, V) after one more id for each row, (B,).

        A <sound> that the model itself has generated is embedded like any other id.
        """
        token_ids = token_ids[:, None]
        x = self.language_model.model.embed_tokens(token_ids)
        x = self.language_model.model(x, torch.ones_like(token_ids, dtype=torch.bool), cache)
        return self.language_model.lm_head(x[:, 0])

    def forward(
        self,
        input_ids,
        attention_mask=None,
        input_features=None,
        feature_attention_mask=None,
        window_index=None,
        labels=None,
        input_features_mask=None,
    ):
        """`.logits` (B, T, V) and, with labels (B, T), `.loss`; else the loss is None.

        input_ids, attention_mask: (B, T), padded left or right. input_features (W, mel bins, mel
        frames), feature_attention_mask (W, mel frames): the windows of all rows, in order.
        transformers calls feature_attention_mask input_features_mask; either name will do.
        window_index (W,): for Music Flamingo and Audio Flamingo Next, the place of each window in
        its recording, 0 for the first.
        The loss is the mean cross-entropy of next tokens whose label is not -100, in float32.
        """
        attention_mask = check_attention_mask(attention_mask, input_ids)
        feature_attention_mask = check_feature_mask(
            input_features, feature_attention_mask, input_features_mask
        )
        x = self.prefill(
            input_ids, attention_mask, input_features, feature_attention_mask, window_index
        )
        logits = self.language_model.lm_head(x)
        loss = None
        if labels is not None:
            predictions = logits[:, :-1].float()
            # Padding on the left would have to predict the first real token.
            targets = labels[:, 1:].masked_fill(~attention_mask[:, :-1], -100)
            loss = F.cross_entropy(predictions.flatten(0, 1), targets.flatten(), ignore_index=-100)
        return SimpleNamespace(logits=logits, loss=loss)

    @torch.inference_mode()
    def stream(
        self,
        input_ids,
        attention_mask=None,
        input_features=None,
        feature_attention_mask=None,
        window_index=None,
        cache=None,
        past_ids=None,
        input_features_mask=None,
        **options,
    ) -> Iterator[Tensor]:
        """The new ids (B,) of each step, as soon as they are known.

        Options are the fields of `GenerationConfig`; those not given are the checkpoint's.
        A conversation goes on with its `cache` and `past_ids` (B, P), the ids that are in it.
        """
        check_option_names(options)
        options = {name: value for name, value in options.items() if value is not None}
        options = replace(self.generation_config, **options)
        attention_mask = check_attention_mask(attention_mask, input_ids)
        feature_attention_mask = check_feature_mask(
            input_features, feature_attention_mask, input_features_mask
        )
        rows, tokens = input_ids.shape
        if cache is None:
            limit = self.config.text_config.max_position_embeddings
            check_length(tokens, options.max_new_tokens, limit)
            cache = self.new_cache(rows, tokens + options.max_new_tokens)
        else:
            check_length(cache.length + tokens, options.max_new_tokens, cache.capacity)

        x = self.prefill(
            input_ids, attention_mask, input_features, feature_attention_mask, window_index, cache
        )
        position = torch.arange(tokens, device=x.device)
        last = (position * attention_mask).argmax(-1)  # (B,), each row's last real token
        x = x[torch.arange(rows, device=x.device), last]  # (B, H)
        logits = self.language_model.lm_head(x)  # (B, V)
        check_finite(logits, self)

        seen = mark_seen(input_ids, attention_mask, logits.shape[-1])
        if past_ids is not None:
            seen |= mark_seen(past_ids, torch.ones_like(past_ids), logits.shape[-1])
        end_ids = torch.tensor(options.eos_token_id, dtype=torch.long, device=x.device)
        ended = torch.zeros(rows, dtype=torch.bool, device=x.device)
        for step in range(1, options.max_new_tokens + 1):
            token_ids = next_token(logits.float(), seen, options)
            token_ids = token_ids.masked_fill(ended, options.pad_token_id)
            yield token_ids
            ended |= torch.isin(token_ids, end_ids)
            if bool(ended.all()) or step == options.max_new_tokens:
                return
            seen.scatter_(1, token_ids[:, None], True)
            logits = self.decode_one_token(token_ids, cache)

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options
    ) -> Tensor:
        """(B, T + new) ids: the prompt as given, then the new ones. Takes what `stream` takes."""
        new_ids = list(self.stream(input_ids, attention_mask, **options))
        return torch.cat([input_ids, torch.stack(new_ids, dim=1)], dim=1)

    def new_cache(self, rows: int, capacity: int) -> KeyValueCache:
        """An empty cache for `capacity` tokens in each row."""
        config = self.config.text_config
        return KeyValueCache(config, rows, capacity, self.dtype, self.device)


# transformers' name for this network where it has the rotary time embedding.
MusicFlamingoForConditionalGeneration = AudioFlamingo3ForConditionalGeneration


# ---- Checks: a ValueError in one line that names the culprit and the remedy ----


def choose_device(device_map: str | torch.device) -> str | torch.device:
    """The device that "auto", a torch.device or its name stands for, if PyTorch can use it."""
    if device_map != "auto":
        check_device(device_map)
        return device_map
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def check_device(device: str | torch.device) -> None:
    try:
        usable = torch.device(device).type in ("cpu", "cuda", "mps")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        usable = False
    if not usable:
        raise ValueError(
            f"device is {str(device)!r}, which PyTorch cannot use here; "
            "auto, cpu, cuda or mps is expected, and auto is always right."
        )


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_dtype(dtype: str | torch.dtype, own_dtype: torch.dtype) -> torch.dtype:
    """The dtype that "auto", a torch.dtype or its name stands for."""
    if dtype == "auto":
        return own_dtype
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; auto, float32, bfloat16 or float16 is expected.")
    return DTYPES[name]


def check_frame_count(is_sound: Tensor, audio_frames: Tensor | None) -> None:
    tokens = int(is_sound.sum())
    frames = 0 if audio_frames is None else len(audio_frames)
    if tokens != frames:
        raise ValueError(
            f"Audio tokens and features mismatch: tokens={tokens}, frames={frames}. "
            "Pass the processor's input_ids together with its input_features."
        )


def check_attention_mask(attention_mask: Tensor | None, input_ids: Tensor) -> Tensor:
    """The mask as (B, T) bool; without one, every token is real."""
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    attention_mask = attention_mask.bool()
    if attention_mask.shape != input_ids.shape or not bool(attention_mask.any(dim=1).all()):
        raise ValueError("attention_mask must have the shape of input_ids, and a 1 in every row.")
    return attention_mask


def check_feature_mask(input_features, mask: Tensor | None, mask_by_other_name: Tensor | None):
    """The mask of the features, under whichever of its two names it was given."""
    if mask is None:
        mask = mask_by_other_name
    if (input_features is None) != (mask is None):
        raise ValueError("input_features and feature_attention_mask are expected together.")
    return mask


def check_window_index(window_index: Tensor | None, input_features: Tensor) -> None:
    if window_index is None or len(window_index) != len(input_features):
        raise ValueError(
            "This model needs window_index, the place of each window in its recording; "
            "pass all that its processor gives."
        )


def check_option_names(options: dict) -> None:
    names = [option.name for option in fields(GenerationConfig)]
    for name in options:
        if name not in names:
            raise ValueError(f"generate() has no option {name!r}; it has {', '.join(names)}.")


def check_length(tokens: int, max_new_tokens: int, limit: int) -> None:
    if tokens + max_new_tokens > limit:
        raise ValueError(
            f"The prompt's {tokens} tokens and max_new_tokens={max_new_tokens} are more than "
            f"the model's {limit} positions; shorten the prompt or its audio, "
            "or lower max_new_tokens."
        )


def check_finite(logits: Tensor, model: nn.Module) -> None:
    """Names the tensor that spoilt the logits."""
    if bool(logits.isfinite().all()):
        return
    culprit = "none; a product has overflowed"
    for name, tensor in model.state_dict().items():
        if not bool(tensor.isfinite().all()):
            culprit = name
            break
    raise ValueError(
        f"The first logits are not finite. The first tensor with NaN or infinity: {culprit}."
    )


def check_generation_options(options: GenerationConfig) -> None:
    check_number("max_new_tokens", options.max_new_tokens, int, 1, 10**9)
    check_number("temperature", options.temperature, float, 1e-6, 10**6)
    check_number("repetition_penalty", options.repetition_penalty, float, 1e-6, 10**6)
    check_number("pad_token_id", options.pad_token_id, int, 0, 10**9)
    if not isinstance(options.do_sample, bool):
        raise ValueError(f"do_sample is {options.do_sample!r}; true or false is expected.")
    if options.top_k is not None:
        check_number("top_k", options.top_k, int, 0, 10**9)
    if options.top_p is not None:
        check_number("top_p", options.top_p, float, 1e-6, 1)
    end_ids = options.eos_token_id
    for end_id in end_ids if isinstance(end_ids, list) else [end_ids]:
        check_number("eos_token_id", end_id, int, 0, 10**9)


def check_number(name: str, value, kind: type, smallest: float, largest: float) -> None:
    if not isinstance(value, (int, kind)) or not smallest <= value <= largest:
        kind_name = "a number" if kind is float else "a whole number"
        raise ValueError(
            f"{name} is {value!r}; {kind_name} from {smallest} to {largest} is expected."
        )
