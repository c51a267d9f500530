"""Audio Flamingo 3, the network: token ids and log-mel windows in, logits or new token ids out.

In the order a sound meets it: configuration; frame arithmetic; the Whisper-style encoder; the projector; the Qwen2
decoder; the whole model, whose `splice` puts each audio frame into its `<sound>` slot; then prefill, decode, generate.

Shapes: B rows, T tokens, W windows, F conv frames, K audio frames, H hidden, V vocabulary, D head dimension.
Module names are the checkpoint's keys, so `load_state_dict(strict=True)` is the whole mapping.
"""
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# ---- Configuration: config.json's sections, with the defaults of transformers, the oracle ----


@dataclass
class AudioFlamingo3EncoderConfig:
    num_mel_bins: int = 128
    hidden_size: int = 1280
    num_hidden_layers: int = 32
    num_attention_heads: int = 20
    intermediate_size: int = 5120
    max_source_positions: int = 1500  # conv frames of one 30 s window

    @classmethod
    def from_dict(cls, section: dict) -> "AudioFlamingo3EncoderConfig":
        older = {"d_model": "hidden_size", "encoder_layers": "num_hidden_layers",
                 "encoder_attention_heads": "num_attention_heads", "encoder_ffn_dim": "intermediate_size"}
        return _known_fields(cls, {older.get(key, key): value for key, value in section.items()})


@dataclass
class Qwen2Config:
    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0

    @classmethod
    def from_dict(cls, section: dict) -> "Qwen2Config":
        return _known_fields(cls, (section.get("rope_parameters") or {}) | section)


@dataclass
class AudioFlamingo3Config:
    audio_config: AudioFlamingo3EncoderConfig = field(default_factory=AudioFlamingo3EncoderConfig)
    text_config: Qwen2Config = field(default_factory=Qwen2Config)
    audio_token_id: int = 151669  # <sound>

    @classmethod
    def from_dict(cls, config: dict) -> "AudioFlamingo3Config":
        """The configuration from the hub layout's `config.json`, in either spelling of its keys."""
        return _known_fields(cls, config | {
            "audio_config": AudioFlamingo3EncoderConfig.from_dict(config.get("audio_config") or {}),
            "text_config": Qwen2Config.from_dict(config.get("text_config") or {})})


def _known_fields(cls, section: dict):
    return cls(**{f.name: section[f.name] for f in fields(cls) if f.name in section})


# ---- Frame arithmetic: the one place that says how many frames a sound becomes ----


def frame_counts(mel_frames):
    """(conv frames, audio frames) of a window with `mel_frames` real mel frames; an int or an integer tensor.

    conv2 has stride 2 and padding 1; the pool halves once more and drops an odd last frame. 3000 -> (1500, 750).
    """
    conv_frames = (mel_frames - 1) // 2 + 1
    return conv_frames, (conv_frames - 2) // 2 + 1


# ---- Encoder: log-mel windows -> audio frames ----


class AudioFlamingo3Attention(nn.Module):
    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.head_dim = hidden // heads
        self.k_proj = nn.Linear(hidden, hidden, bias=False)
        self.v_proj = nn.Linear(hidden, hidden)
        self.q_proj = nn.Linear(hidden, hidden)
        self.out_proj = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (W, heads, F, D)
        # q is scaled before the product, not after: in bfloat16 the order shows
        q, k, v = heads(self.q_proj(x) * self.head_dim ** -0.5), heads(self.k_proj(x)), heads(self.v_proj(x))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class AudioFlamingo3EncoderLayer(nn.Module):
    def __init__(self, config: AudioFlamingo3EncoderConfig):
        super().__init__()
        hidden = config.hidden_size
        self.self_attn = AudioFlamingo3Attention(hidden, config.num_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(hidden)
        self.fc1 = nn.Linear(hidden, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, hidden)
        self.final_layer_norm = nn.LayerNorm(hidden)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x), mask)
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class AudioFlamingo3Encoder(nn.Module):
    """Whisper's encoder, then an average pool over time and a LayerNorm."""

    def __init__(self, config: AudioFlamingo3EncoderConfig):
        super().__init__()
        hidden = config.hidden_size
        self.conv1 = nn.Conv1d(config.num_mel_bins, hidden, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(hidden, hidden, kernel_size=3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(config.max_source_positions, hidden)
        self.layers = nn.ModuleList(AudioFlamingo3EncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.layer_norm = nn.LayerNorm(hidden)

    def forward(self, input_features: Tensor, feature_attention_mask: Tensor) -> Tensor:
        """Post-pool states (W, K of the longest window, H).

        input_features: (W, mel bins, mel frames), at most 30 s, cast to the encoder's own dtype.
        feature_attention_mask: (W, mel frames), 1 on frames of real samples, which come first.
        """
        mel_frames = feature_attention_mask.sum(-1)
        longest = int(mel_frames.max())
        # the last real conv frame reads two mel frames past the last real one; nothing further changes a number
        x = input_features[:, :, :longest + 2].to(self.conv1.weight.dtype)
        x = F.gelu(self.conv2(F.gelu(self.conv1(x)))).transpose(1, 2)
        conv_frames, _ = frame_counts(mel_frames)
        x = x[:, :frame_counts(longest)[0]]                             # (W, F, H)
        x = x + self.embed_positions.weight[:x.shape[1]]
        mask = None
        if bool((conv_frames < x.shape[1]).any()):
            padded = torch.arange(x.shape[1], device=x.device) >= conv_frames[:, None]
            mask = x.new_zeros(padded.shape).masked_fill(padded, float("-inf"))[:, None, None]  # (W, 1, 1, F)
        for layer in self.layers:
            x = layer(x, mask)
        x = x[:, :x.shape[1] // 2 * 2].unflatten(1, (-1, 2)).mean(2)    # (W, K, H); an odd last conv frame drops
        return self.layer_norm(x)


class AudioFlamingo3MultiModalProjector(nn.Module):
    def __init__(self, audio_hidden: int, text_hidden: int):
        super().__init__()
        self.linear_1 = nn.Linear(audio_hidden, text_hidden)
        self.linear_2 = nn.Linear(text_hidden, text_hidden)

    def forward(self, frames: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(frames)))


# ---- Decoder: embeddings -> hidden states, with or without a key-value cache ----


class KeyValueCache:
    """Keys and values of every layer, allocated once for one call or one conversation.

    All rows write into the same slots. A row shorter than its prefill leaves a gap there, which `visible` (B, slots)
    hides; a row's positions count its own tokens only (`lengths`, (B,)).
    """

    def __init__(self, config: Qwen2Config, rows: int, slots: int, like: Tensor):
        head_dim = config.hidden_size // config.num_attention_heads
        self.keys_values = like.new_empty(
            config.num_hidden_layers, 2, rows, config.num_key_value_heads, slots, head_dim)
        self.visible = torch.ones(rows, slots, dtype=torch.bool, device=like.device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=like.device)
        self.used = 0          # slots written
        self.gaps = False      # some slot is hidden from some row

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes (B, key-value heads, T, D) into the next T slots; returns all keys and values up to there."""
        end = self.used + k.shape[2]
        keys, values = self.keys_values[layer]
        keys[:, :, self.used:end], values[:, :, self.used:end] = k, v
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, tokens: int, lengths: Tensor) -> None:
        """Counts `tokens` slots as written, of which the first `lengths` (B,) of each row are real."""
        new = self.visible[:, self.used:self.used + tokens]
        new[:] = torch.arange(tokens, device=new.device) < lengths[:, None]
        self.gaps = self.gaps or int(lengths.min()) < tokens
        self.lengths = self.lengths + lengths
        self.used += tokens


def rotary_tables(positions: Tensor, head_dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each (B, 1, T, D), of positions (B, T); angles in float32, the tables rounded to `dtype`."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    angles = positions[:, None, :, None].float() * (1.0 / base ** exponents)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Qwen2RMSNorm(nn.Module):
    def __init__(self, hidden: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # rounded before the weight, as the oracle does; F.rms_norm rounds once and differs in bfloat16
        y = x.float()
        return self.weight * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Qwen2Attention(nn.Module):
    def __init__(self, config: Qwen2Config):
        super().__init__()
        hidden, self.head_dim = config.hidden_size, config.hidden_size // config.num_attention_heads
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * self.head_dim)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * self.head_dim)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * self.head_dim)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, hidden, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cache, layer: int) -> Tensor:
        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, T, D)
        q, k, v = rotate(heads(self.q_proj(x)), *rope), rotate(heads(self.k_proj(x)), *rope), heads(self.v_proj(x))
        if cache is not None:
            k, v = cache.write(layer, k, v)
        if q.shape[2] == 1:  # decode: the query heads that share a key-value head are its rows, so nothing is repeated
            grouped = q.view(q.shape[0], k.shape[1], -1, self.head_dim)
            y = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).flatten(1, 2)[:, None]
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
            y = y.transpose(1, 2)
        return self.o_proj(y.flatten(2))


class Qwen2MLP(nn.Module):
    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Qwen2DecoderLayer(nn.Module):
    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.self_attn = Qwen2Attention(config)
        self.mlp = Qwen2MLP(config)
        self.input_layernorm = Qwen2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Qwen2RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cache, layer: int) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen2Model(nn.Module):
    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Qwen2DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = Qwen2RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, lengths: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Hidden states (B, T, H) of embeddings x (B, T, H), right-padded to T, of which `lengths` (B,) are real."""
        rows, tokens, hidden = x.shape
        positions = torch.arange(tokens, device=x.device).expand(rows, -1)
        mask = None  # causal attention never looks right, where the padding is
        if cache is not None:
            positions = positions + cache.lengths[:, None]
            mask = self._cache_mask(cache, tokens)
        head_dim = hidden // self.config.num_attention_heads
        rope = rotary_tables(positions, head_dim, self.config.rope_theta, x.dtype)
        for index, layer in enumerate(self.layers):
            x = layer(x, rope, mask, cache, index)
        if cache is not None:
            cache.advance(tokens, lengths)
        return self.norm(x)

    @staticmethod
    def _cache_mask(cache: KeyValueCache, tokens: int) -> Tensor | None:
        """True where a new token may look, (B, 1, tokens, slots); None where causality says it all."""
        if cache.used == 0 or (tokens == 1 and not cache.gaps):
            return None
        end = cache.used + tokens
        slots = torch.arange(end, device=cache.visible.device)
        causal = slots <= slots[cache.used:, None]
        return (causal & cache.visible[:, None, :end])[:, None]


class Qwen2ForCausalLM(nn.Module):
    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.model = Qwen2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


# ---- The whole model: the splice, the loss, prefill and decode ----


@dataclass
class CausalLMOutput:
    logits: Tensor               # (B, T, V)
    loss: Tensor | None = None   # scalar


@dataclass
class GenerationConfig:
    """How `generate` goes on and when it ends: generation_config.json's fields, checked."""
    max_new_tokens: int = 512
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    eos_token_id: int | list[int] | None = None  # [] never stops early
    pad_token_id: int | None = None              # what a finished row goes on with

    def __post_init__(self):
        bounds = {"max_new_tokens": self.max_new_tokens >= 1, "temperature": self.temperature > 0,
                  "top_k": self.top_k is None or self.top_k >= 1, "top_p": self.top_p is None or 0 < self.top_p <= 1,
                  "repetition_penalty": self.repetition_penalty > 0}
        for name, fits in bounds.items():
            if not fits:
                limit = "in (0, 1]" if name == "top_p" else "at least 1" if name[-1] in "sk" else "above 0"
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {limit}.")
        if isinstance(self.eos_token_id, int):
            self.eos_token_id = [self.eos_token_id]


def windows_of_like_length(mel_frames: list[int], at_once: int = 4 * 3000) -> list[list[int]]:
    """Window indices in groups, longest first, that pad at most a third and hold at most `at_once` mel frames."""
    groups: list[list[int]] = []
    for window in sorted(range(len(mel_frames)), key=mel_frames.__getitem__, reverse=True):
        longest = mel_frames[groups[-1][0]] if groups else 0
        if groups and 4 * mel_frames[window] >= 3 * longest and (len(groups[-1]) + 1) * longest <= at_once:
            groups[-1].append(window)
        else:
            groups.append([window])
    return groups


def roll_to_right_padding(attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Indices (B, T) that put each row's real tokens first, those that put them back, and the rows' lengths (B,).

    A left-padded query has no key to attend to, and the softmax of nothing is NaN; rolled right, none needs a mask.
    """
    tokens = attention_mask.shape[1]
    steps = torch.arange(tokens, device=attention_mask.device)
    lengths, first = attention_mask.sum(-1), attention_mask.argmax(-1, keepdim=True)
    to_right = (steps + first) % tokens
    if bool((lengths == 0).any()) or not torch.equal(attention_mask.gather(1, to_right).bool(), steps < lengths[:, None]):
        raise ValueError("attention_mask: each row must be one unbroken run of ones, padded on the left or the right.")
    return to_right, (steps - first) % tokens, lengths


class AudioFlamingo3ForConditionalGeneration(nn.Module):
    def __init__(self, config: AudioFlamingo3Config):
        super().__init__()
        self.config = config
        self.generation_config = GenerationConfig()
        self.audio_tower = AudioFlamingo3Encoder(config.audio_config)
        self.multi_modal_projector = AudioFlamingo3MultiModalProjector(
            config.audio_config.hidden_size, config.text_config.hidden_size)
        self.language_model = Qwen2ForCausalLM(config.text_config)

    @classmethod
    def from_pretrained(cls, path, device_map="auto", dtype="auto") -> "AudioFlamingo3ForConditionalGeneration":
        """See `load_weights.load_model`."""
        from load_weights import load_model
        return load_model(path, device_map, dtype)

    @property
    def device(self) -> torch.device:
        return self.language_model.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.lm_head.weight.dtype

    def get_audio_features(self, input_features: Tensor, feature_attention_mask: Tensor) -> Tensor:
        """Projected audio frames (sum of K, text hidden) of all windows, real frames only, in order."""
        mel_frames = feature_attention_mask.sum(-1)
        counts = frame_counts(mel_frames)[1].tolist()
        frames: list[Tensor] = [input_features] * len(counts)
        for group in windows_of_like_length(mel_frames.tolist()):
            states = self.audio_tower(input_features[group], feature_attention_mask[group])
            for window, row in zip(group, states):
                frames[window] = row[:counts[window]]
        return self.multi_modal_projector(torch.cat(frames))

    def splice(self, input_ids: Tensor, audio_frames: Tensor | None) -> Tensor:
        """Embeddings (B, T, H) in which each `<sound>` slot holds one audio frame, in order, in place."""
        x = self.language_model.model.embed_tokens(input_ids)
        slots = input_ids == self.config.audio_token_id
        tokens, frames = int(slots.sum()), 0 if audio_frames is None else len(audio_frames)
        if tokens != frames:
            raise ValueError(f"Audio tokens and features mismatch: tokens={tokens}, frames={frames}. "
                             "Pass the processor's input_ids together with its input_features.")
        return x if audio_frames is None else x.masked_scatter(slots[..., None], audio_frames.to(x.dtype))

    def _hidden_states(self, input_ids, attention_mask, input_features, feature_attention_mask, cache=None):
        """Right-padded hidden states (B, T, H), the indices that put the padding back, the rows' lengths (B,)."""
        to_right, back, lengths = roll_to_right_padding(attention_mask)
        frames = None if input_features is None else self.get_audio_features(input_features, feature_attention_mask)
        x = self.splice(input_ids.gather(1, to_right), frames)
        return self.language_model.model(x, lengths, cache), back, lengths

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, input_features: Tensor | None = None,
                feature_attention_mask: Tensor | None = None, labels: Tensor | None = None) -> CausalLMOutput:
        """Logits (B, T, V), and with labels (B, T) the mean cross-entropy of each next token whose label is not -100.

        input_ids, attention_mask: (B, T), padded left or right. input_features: (W, mel bins, mel frames) and
        feature_attention_mask: (W, mel frames), the windows of all rows in order. Nothing is predicted from padding.
        """
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        x, back, _ = self._hidden_states(input_ids, attention_mask, input_features, feature_attention_mask)
        logits = self.language_model.lm_head(x.gather(1, back[..., None].expand_as(x)))
        loss = None
        if labels is not None:
            targets = labels[:, 1:].masked_fill(attention_mask[:, :-1] == 0, -100)
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=-100)
        return CausalLMOutput(logits, loss)

    def prefill(self, input_ids: Tensor, attention_mask: Tensor, input_features: Tensor | None,
                feature_attention_mask: Tensor | None, cache: KeyValueCache) -> Tensor:
        """Logits (B, V) after each row's last real token. The cache may already hold a conversation's past."""
        x, _, lengths = self._hidden_states(input_ids, attention_mask, input_features, feature_attention_mask, cache)
        return self.language_model.lm_head(x[torch.arange(len(x), device=x.device), lengths - 1])

    def decode_one_token(self, token_ids: Tensor, cache: KeyValueCache) -> Tensor:
        """Logits (B, V) after one more token a row, (B,). A `<sound>` the model itself said is an id like any other."""
        x = self.language_model.model.embed_tokens(token_ids[:, None])
        x = self.language_model.model(x, torch.ones_like(token_ids), cache)
        return self.language_model.lm_head(x[:, 0])

    @torch.inference_mode()
    def stream(self, input_ids: Tensor, attention_mask: Tensor | None = None, input_features: Tensor | None = None,
               feature_attention_mask: Tensor | None = None, **options) -> Iterator[Tensor]:
        """The new ids (B,) of each step, as soon as they are known; the options are `GenerationConfig`'s fields."""
        given = {name: value for name, value in options.items() if value is not None}
        config = replace(self.generation_config, **given)
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        prompt, most = int(attention_mask.sum(-1).max()), self.config.text_config.max_position_embeddings
        if prompt + config.max_new_tokens > most:
            raise ValueError(f"The prompt's {prompt} tokens and max_new_tokens={config.max_new_tokens} are more than "
                             f"the model's {most} positions; shorten one of them.")
        rows, tokens = input_ids.shape
        cache = KeyValueCache(self.config.text_config, rows, tokens + config.max_new_tokens,
                              self.language_model.lm_head.weight)
        logits = self.prefill(input_ids, attention_mask, input_features, feature_attention_mask, cache)
        seen = torch.zeros_like(logits, dtype=torch.long).scatter_add(1, input_ids, attention_mask).bool()
        ends = torch.tensor(config.eos_token_id or [], device=input_ids.device, dtype=torch.long)
        finished = torch.zeros(rows, dtype=torch.bool, device=input_ids.device)
        for step in range(config.max_new_tokens):
            if step:
                logits = self.decode_one_token(token_ids, cache)
            token_ids = next_token(logits.float(), seen, config)
            token_ids = token_ids.masked_fill(finished, config.pad_token_id or 0)
            yield token_ids
            seen.scatter_(1, token_ids[:, None], True)
            finished |= torch.isin(token_ids, ends)
            if bool(finished.all()):
                return

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs_and_options) -> Tensor:
        """(B, T + new) ids: the prompt as given, then what the model says; see `stream`."""
        new = list(self.stream(input_ids, attention_mask, **inputs_and_options))
        return torch.cat([input_ids, torch.stack(new, dim=1)], dim=1)


def next_token(logits: Tensor, seen: Tensor, config: GenerationConfig) -> Tensor:
    """The next id (B,) of float32 logits (B, V): repetition penalty on the ids `seen` (B, V), then greedy or sampled."""
    if config.repetition_penalty != 1:
        penalised = torch.where(logits < 0, logits * config.repetition_penalty, logits / config.repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    if not config.do_sample:
        return logits.argmax(-1)
    logits = logits / config.temperature
    if config.top_k is not None:
        worst = logits.topk(min(config.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < worst, float("-inf"))
    if config.top_p is not None:  # the smallest set of most likely ids that holds top_p of the probability
        ordered, ids = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        logits = torch.full_like(logits, float("-inf")).scatter(1, ids, ordered.masked_fill(before >= config.top_p, float("-inf")))
    return torch.multinomial(logits.softmax(-1), 1)[:, 0]
