"""Audio Flamingo 3, the network: token ids and log-mel windows in, logits or new token ids out.

In the order a sound meets it: configuration, frame arithmetic, Whisper-style encoder, projector, Qwen2 decoder, then the
whole model, whose `splice` puts each audio frame into its `<sound>` slot, and which decodes token by token.
Shapes: B rows, T tokens, W windows, F conv frames, K audio frames, H hidden, D of a head, V vocabulary.
Module names are the checkpoint's keys, so `load_state_dict(strict=True)` is the whole mapping.
"""
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---- Configuration: the fields of config.json, with the defaults of transformers, the oracle ----
@dataclass
class AudioFlamingo3EncoderConfig:
    num_mel_bins: int = 128
    hidden_size: int = 1280
    num_hidden_layers: int = 32
    num_attention_heads: int = 20
    intermediate_size: int = 5120
    max_source_positions: int = 1500  # conv frames of one 30 s window

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
    head_dim = property(lambda self: self.hidden_size // self.num_attention_heads)

@dataclass
class AudioFlamingo3Config:
    audio_config: AudioFlamingo3EncoderConfig = field(default_factory=AudioFlamingo3EncoderConfig)
    text_config: Qwen2Config = field(default_factory=Qwen2Config)
    audio_token_id: int = 151669  # <sound>

# ---- Frame arithmetic: the one place that says how many frames a sound becomes ----
def frame_counts(mel_frames):
    """(conv frames, audio frames) of a window with `mel_frames` real mel frames, an int or a tensor. 3000 -> (1500, 750)."""
    conv_frames = (mel_frames - 1) // 2 + 1          # conv2: kernel 3, stride 2, padding 1
    return conv_frames, (conv_frames - 2) // 2 + 1   # the pool: 2 to 1; an odd last conv frame is dropped

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
        # q is scaled before the product, not after: in bfloat16 the order shows. The projections' width counts the heads.
        projected = self.q_proj(x) * self.head_dim ** -0.5, self.k_proj(x), self.v_proj(x)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in projected)  # (W, heads, F, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
        return self.out_proj(y.transpose(1, 2).flatten(2))

class AudioFlamingo3EncoderLayer(nn.Module):
    def __init__(self, config: AudioFlamingo3EncoderConfig):
        super().__init__()
        self.self_attn = AudioFlamingo3Attention(config.hidden_size, config.num_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)
    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x), mask)
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))

class AudioFlamingo3Encoder(nn.Module):
    def __init__(self, config: AudioFlamingo3EncoderConfig):
        super().__init__()
        self.conv1 = nn.Conv1d(config.num_mel_bins, config.hidden_size, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(config.hidden_size, config.hidden_size, kernel_size=3, stride=2, padding=1)
        positions = torch.zeros(config.max_source_positions, config.hidden_size)  # nn.Embedding's own start imports for 1 s
        self.embed_positions = nn.Embedding.from_pretrained(positions, freeze=False)
        self.layers = nn.ModuleList(AudioFlamingo3EncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.layer_norm = nn.LayerNorm(config.hidden_size)
    def forward(self, input_features: Tensor, feature_attention_mask: Tensor) -> Tensor:
        """Whisper's encoder, an average pool over time, a LayerNorm: states (W, K of the longest window, H).
        input_features: (W, mel bins, mel frames), up to 30 s, cast to the encoder's own dtype.
        feature_attention_mask: (W, mel frames), 1 on frames of real samples, which come first.
        """
        conv_frames = frame_counts(feature_attention_mask.sum(-1))[0]  # (W,): the real ones
        longest = int(conv_frames.max())
        x = input_features[:, :, :2 * longest + 1].to(self.conv1.weight.dtype)  # all that the last real conv frame reads
        x = F.gelu(self.conv2(F.gelu(self.conv1(x)))).transpose(1, 2)[:, :longest]  # (W, F, H)
        x = x + self.embed_positions.weight[:longest]
        real = torch.arange(longest, device=x.device) < conv_frames[:, None]
        mask = None if bool(real.all()) else real[:, None, None]  # (W, 1, 1, F)
        for layer in self.layers:
            x = layer(x, mask)
        x = x[:, :longest // 2 * 2].unflatten(1, (-1, 2)).mean(2)  # (W, K, H); an odd last conv frame was only a key
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
    """Keys and values of every layer, allocated once for a call or a conversation; all rows take the same slots."""
    def __init__(self, config: Qwen2Config, rows: int, slots: int, dtype: torch.dtype, device: torch.device):
        shape = config.num_hidden_layers, 2, rows, config.num_key_value_heads, slots, config.head_dim
        self.keys_values = torch.empty(shape, dtype=dtype, device=device)
        self.visible = torch.zeros(rows, slots, dtype=torch.bool, device=device)  # False where a row was padded
        self.seen = torch.zeros(rows, config.vocab_size, dtype=torch.bool, device=device)  # ids, for the repetition penalty
        self.used = 0  # slots

def rotary_tables(positions: Tensor, head_dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and signed sin (B, 1, T, D) of positions (B, T); the angles are float32, the tables rounded to `dtype`."""
    frequencies = 1.0 / base ** (torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angles = positions[:, None, :, None].float() * frequencies
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)

def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin  # rolled by half a head: each number beside its pair

class Qwen2RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:  # rounded before the weight, as the oracle does; F.rms_norm rounds once
        y = x.float()
        return self.weight * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)

class Qwen2Attention(nn.Module):
    def __init__(self, config: Qwen2Config):
        super().__init__()
        hidden, self.head_dim = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * self.head_dim)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * self.head_dim)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * self.head_dim)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, hidden, bias=False)
    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cached: Tensor | None) -> Tensor:
        projected = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in projected)  # (B, heads, T, D)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cached is not None:  # (2, B, heads, slots, D): the last T slots are these tokens'
            cached[0, :, :, -x.shape[1]:], cached[1, :, :, -x.shape[1]:] = k, v
            k, v = cached
        if q.shape[2] == 1:  # decode: the query heads that share a key-value head become its T, and nothing is repeated
            q = q.view(len(q), k.shape[1], -1, self.head_dim)  # (B, key-value heads, query heads of each, D)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).flatten(1)[:, None]
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
            y = y.transpose(1, 2).flatten(2)
        return self.o_proj(y)

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
    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cached: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cached)
        return x + self.mlp(self.post_attention_layernorm(x))

class Qwen2Model(nn.Module):
    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding.from_pretrained(torch.zeros(config.vocab_size, config.hidden_size), freeze=False)
        self.layers = nn.ModuleList(Qwen2DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = Qwen2RMSNorm(config.hidden_size, config.rms_norm_eps)
    def forward(self, x: Tensor, real: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Hidden states (B, T, H) of embeddings x (B, T, H), padded on the right where `real` (B, T) is False."""
        tokens, mask, cached, visible = x.shape[1], None, [None] * len(self.layers), real
        if cache is not None:  # these tokens take the next free slots; each layer writes its keys and values there
            cache.visible[:, cache.used:cache.used + tokens] = real
            cache.used += tokens
            cached, visible = cache.keys_values[..., :cache.used, :], cache.visible[:, :cache.used]
        # without a past causality suffices, as padding is on the right; one token after a past without gaps sees it all
        if visible.shape[1] > tokens and not (tokens == 1 and bool(visible.all())):
            slots = torch.arange(visible.shape[1], device=x.device)
            mask = (visible[:, None] & (slots <= slots[-tokens:, None]))[:, None]  # (B, 1, T, slots)
        positions = visible.cumsum(-1)[:, -tokens:] - 1
        rope = rotary_tables(positions, self.config.head_dim, self.config.rope_theta, x.dtype)
        for layer, layer_cached in zip(self.layers, cached):
            x = layer(x, rope, mask, layer_cached)
        return self.norm(x)

# ---- The whole model ----
@dataclass
class GenerationConfig:
    """The options of `generate`, under their names in generation_config.json."""
    max_new_tokens: int = 512
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    eos_token_id: int | list[int] = field(default_factory=list)  # [] never stops early
    pad_token_id: int = 0                                         # what a finished row goes on with

    def __post_init__(self):
        for name, kind, least, most in (("max_new_tokens", int, 1, 1e9), ("top_k", int, 0, 1e9), ("top_p", float, 1e-6, 1),
                ("temperature", float, 1e-6, 1e6), ("repetition_penalty", float, 1e-6, 1e6),
                ("do_sample", bool, 0, 1), ("pad_token_id", int, 0, 1e9), ("eos_token_id", int, 0, 1e9)):
            given = getattr(self, name)
            for value in given if isinstance(given, list) and name == "eos_token_id" else [given]:
                if value is not None and not (isinstance(value, (int, kind)) and least <= value <= most):
                    raise ValueError(f"{name} is {value!r}; {kind.__name__} between {least} and {most} is expected.")

def next_token(logits: Tensor, seen: Tensor, options: GenerationConfig) -> Tensor:
    """The next ids (B,) of float32 logits (B, V); the repetition penalty falls on the ids `seen` (B, V)."""
    if options.repetition_penalty != 1:
        penalised = torch.where(logits < 0, logits * options.repetition_penalty, logits / options.repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    if not options.do_sample:
        return logits.argmax(-1)
    probabilities, ids = (logits / options.temperature).softmax(-1).sort(descending=True)
    if options.top_k:  # 0 is no limit either
        probabilities[:, options.top_k:] = 0
    if options.top_p is not None:  # the fewest ids that hold top_p of what is left: those before which it is not reached
        probabilities[probabilities.cumsum(-1) - probabilities >= options.top_p * probabilities.sum(-1, keepdim=True)] = 0
    return ids.gather(1, torch.multinomial(probabilities, 1))[:, 0]

class AudioFlamingo3ForConditionalGeneration(nn.Module):
    def __init__(self, config: AudioFlamingo3Config):
        super().__init__()
        self.config, self.generation_config, text = config, GenerationConfig(), config.text_config
        self.audio_tower = AudioFlamingo3Encoder(config.audio_config)
        self.multi_modal_projector = AudioFlamingo3MultiModalProjector(config.audio_config.hidden_size, text.hidden_size)
        self.language_model = nn.ModuleDict({
            "model": Qwen2Model(text), "lm_head": nn.Linear(text.hidden_size, text.vocab_size, bias=False)})

    @classmethod
    def from_pretrained(cls, path, device_map="auto", dtype="auto", int8=False, think=False):
        from load_weights import load_model  # its docstring says what the arguments mean
        return load_model(path, device_map, dtype, int8, think)

    device = property(lambda self: self.language_model.model.embed_tokens.weight.device)
    dtype = property(lambda self: self.language_model.model.embed_tokens.weight.dtype)

    def get_audio_features(self, input_features: Tensor, feature_attention_mask: Tensor) -> Tensor:
        """Projected audio frames (sum of K, text H): the real ones of all windows, in order."""
        mel_frames = feature_attention_mask.sum(-1)
        seconds, states = mel_frames // 100, {}
        for length in seconds.unique():  # like lengths together, so that none is padded much; 8 bound the memory
            for group in (seconds == length).nonzero()[:, 0].split(8):
                states.update(zip(group.tolist(), self.audio_tower(input_features[group], feature_attention_mask[group])))
        frames = [states[window][:count] for window, count in enumerate(frame_counts(mel_frames)[1].tolist())]
        return self.multi_modal_projector(torch.cat(frames))

    def splice(self, input_ids: Tensor, audio_frames: Tensor) -> Tensor:
        """Embeddings (B, T, H) in which each `<sound>` slot holds one audio frame, in order, in place."""
        slots = input_ids == self.config.audio_token_id
        if slots.sum() != len(audio_frames):
            raise ValueError(f"Audio tokens and features mismatch: tokens={slots.sum()}, frames={len(audio_frames)}. "
                             "Pass the processor's input_ids together with its input_features.")
        x = self.language_model.model.embed_tokens(input_ids)
        return x.masked_scatter(slots[..., None], audio_frames.to(x.dtype))

    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None, input_features: Tensor | None,
                feature_attention_mask: Tensor | None, cache: KeyValueCache | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Right-padded hidden states (B, T, H), where they are `real` (B, T), and which position each came from (B, T).
        A left-padded query has no key to attend to, and the softmax of nothing is NaN; so each row's padding is moved
        to its right, where causal attention never looks. The cache may already hold a conversation's past.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.bool()
        source = mask.argsort(descending=True, stable=True)
        real = mask.gather(1, source).bool()
        if mask.shape != input_ids.shape or not bool(real[:, 0].all()):
            raise ValueError("attention_mask: of input_ids' shape, with a one in every row, is expected.")
        heard = input_features is not None
        frames = self.get_audio_features(input_features, feature_attention_mask) if heard else input_ids.new_empty(0)
        x = self.splice(input_ids.gather(1, source), frames)
        if cache is None or not cache.used:
            return self.language_model.model(x, real, cache), real, source
        parts = zip(x.split(1024, 1), real.split(1024, 1))  # after a past there is a mask, tokens x slots: small in parts
        return torch.cat([self.language_model.model(*part, cache) for part in parts], 1), real, source

    def decode_one_token(self, token_ids: Tensor, cache: KeyValueCache) -> Tensor:
        """Logits (B, V) after one more token a row, (B,). A `<sound>` the model itself said is an id like any other."""
        x = self.language_model.model.embed_tokens(token_ids[:, None])
        x = self.language_model.model(x, torch.ones_like(token_ids[:, None], dtype=torch.bool), cache)
        return self.language_model.lm_head(x[:, 0])

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, input_features: Tensor | None = None,
                feature_attention_mask: Tensor | None = None, labels: Tensor | None = None) -> SimpleNamespace:
        """`.logits` (B, T, V); with labels (B, T) `.loss`, the mean cross-entropy of the next tokens not labelled -100.
        input_ids, attention_mask: (B, T), padded left or right; padding predicts nothing. input_features (W, mel bins,
        mel frames), feature_attention_mask (W, mel frames): the windows of all rows, in order.
        """
        x, real, source = self.prefill(input_ids, attention_mask, input_features, feature_attention_mask)
        back, loss = source.argsort(1), None
        logits = self.language_model.lm_head(x.take_along_dim(back[..., None], 1))
        if labels is not None:
            targets = labels[:, 1:].clone().masked_fill_(~real.gather(1, back)[:, :-1], -100)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=-100)
        return SimpleNamespace(logits=logits, loss=loss)

    @torch.inference_mode()
    def stream(self, input_ids: Tensor, attention_mask: Tensor | None = None, input_features: Tensor | None = None,
               feature_attention_mask: Tensor | None = None, cache: KeyValueCache | None = None, **options) -> Iterator[Tensor]:
        """The new ids (B,) of each step; options are `GenerationConfig`'s fields, `cache` may hold a conversation's past."""
        options = replace(self.generation_config, **{name: given for name, given in options.items() if given is not None})
        rows, tokens = input_ids.shape[0], input_ids.shape[1] + (cache.used if cache else 0)
        slots = tokens + options.max_new_tokens
        limit = cache.visible.shape[1] if cache else self.config.text_config.max_position_embeddings
        if slots > limit:
            raise ValueError(f"The prompt's {tokens} tokens and max_new_tokens={options.max_new_tokens} are more than the "
                             f"model's {limit} positions; shorten the audio or lower max_new_tokens.")
        cache = cache or KeyValueCache(self.config.text_config, rows, slots, self.dtype, self.device)
        x, real, source = self.prefill(input_ids, attention_mask, input_features, feature_attention_mask, cache)
        logits = self.language_model.lm_head(x[torch.arange(rows, device=x.device), real.sum(-1) - 1])  # (B, V)
        if not bool(logits.isfinite().all()):
            bad = next((name for name, w in self.state_dict().items() if not bool(w.isfinite().all())), "none: overflow")
            raise ValueError(f"The first logits are not finite. The first tensor that holds NaN or infinity: {bad}.")
        cache.seen |= torch.zeros_like(logits, dtype=torch.long).scatter_add(1, input_ids.gather(1, source), real.long()) > 0
        ends = torch.tensor(options.eos_token_id, dtype=torch.long, device=x.device)
        finished = torch.zeros(rows, dtype=torch.bool, device=x.device)
        for step in range(options.max_new_tokens):
            if step:
                cache.seen.scatter_(1, token_ids[:, None], True)
                logits = self.decode_one_token(token_ids, cache)
            token_ids = next_token(logits.float(), cache.seen, options).masked_fill(finished, options.pad_token_id)
            yield token_ids
            finished |= torch.isin(token_ids, ends)
            if bool(finished.all()):
                return

    def generate(self, input_ids: Tensor, *features, **options) -> Tensor:
        """(B, T + new) ids: the prompt as given, then the new ones; arguments and errors are those of `stream`."""
        return torch.cat([input_ids, torch.stack(list(self.stream(input_ids, *features, **options)), dim=1)], dim=1)
