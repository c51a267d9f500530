"""The names of our af3.py, on top of transformers 5.23, for `--implementation transformers`.
There, arguments have other names and places. Every number comes from there."""

from functools import partial
from types import SimpleNamespace

import torch
import transformers
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.audioflamingo3 import modeling_audioflamingo3 as audio
from transformers.models.musicflamingo import modeling_musicflamingo as music
from transformers.models.qwen2 import modeling_qwen2 as qwen2

SDPA = {"attn_implementation": "sdpa"}  # the default of whole models
AudioFlamingo3Config = transformers.AudioFlamingo3Config
AudioFlamingo3EncoderConfig = partial(transformers.AudioFlamingo3EncoderConfig, **SDPA)
AudioFlamingo3MultiModalProjector = audio.AudioFlamingo3MultiModalProjector
Qwen2Config = partial(transformers.Qwen2Config, **SDPA)
Qwen2MLP, Qwen2RMSNorm, rotate_half = qwen2.Qwen2MLP, qwen2.Qwen2RMSNorm, qwen2.rotate_half
GenerationConfig = transformers.GenerationConfig
KeyValueCache = transformers.DynamicCache
frame_counts = partial(audio.AudioFlamingo3Encoder._get_feat_extract_output_lengths, None)


class AudioFlamingo3Attention(audio.AudioFlamingo3Attention):
    def __init__(self, config):
        super().__init__(config.hidden_size, config.num_attention_heads, config=config)

    def forward(self, x, mask):
        return super().forward(x, attention_mask=mask)[0]


class AudioFlamingo3Encoder(audio.AudioFlamingo3Encoder):
    def __call__(self, *arguments, **by_name):  # by name in the whole model
        output = super().__call__(*arguments, **by_name)
        return output if by_name else output.last_hidden_state


def splice(x, is_sound, audio_frames):
    """The forward pass there, with values in the place of embedding, encoder and decoder."""
    model = audio.AudioFlamingo3Model
    me = SimpleNamespace(config=SimpleNamespace(audio_token_id=1, return_dict=True))
    me.get_input_embeddings = lambda: lambda ids: x
    me.get_audio_features = lambda *_, **__: SimpleNamespace(pooler_output=audio_frames)
    me.get_placeholder_mask = partial(model.get_placeholder_mask, me)
    me.language_model = lambda inputs_embeds, **_: BaseModelOutputWithPast(inputs_embeds)
    return model.forward(me, is_sound.long(), audio_frames).last_hidden_state


def rotary_tables(positions, head_dim, base, dtype):
    config = Qwen2Config(hidden_size=head_dim, num_attention_heads=1, rope_theta=base)
    tables = qwen2.Qwen2RotaryEmbedding(config)(torch.zeros(1, dtype=dtype), positions)
    return [table[:, None] for table in tables]


class Qwen2Attention(qwen2.Qwen2Attention):
    def forward(self, x, cos, sin, mask, cache):
        return super().forward(x, (cos[:, 0], sin[:, 0]), mask, cache)[0]


class Qwen2DecoderLayer(qwen2.Qwen2DecoderLayer):
    def forward(self, x, cos, sin, mask, cache):
        return super().forward(x, mask, position_embeddings=(cos[:, 0], sin[:, 0]))


def next_token(logits, options):
    if not options.do_sample:
        return logits.argmax(-1)
    warpers = transformers.GenerationMixin()._get_logits_processor(options)
    return torch.multinomial(warpers(None, logits).softmax(-1), num_samples=1)[:, 0]


def penalize_repetition(logits, seen_ids, penalty):
    return transformers.RepetitionPenaltyLogitsProcessor(penalty)(seen_ids, logits)


class Ours:
    audio_tower = property(lambda self: self.model.audio_tower)
    multi_modal_projector = property(lambda self: self.model.multi_modal_projector)
    is_custom_code = classmethod(lambda cls: False)  # else it would save other names of tensors

    def __init__(self, config):
        super().__init__(config)
        self.model.audio_tower.__class__ = AudioFlamingo3Encoder

    def __call__(self, input_ids=None, attention_mask=None, **others):
        return super().__call__(input_ids, attention_mask=attention_mask, **in_theirs(others))

    def generate(self, input_ids, attention_mask=None, **others):
        return super().generate(input_ids, attention_mask=attention_mask, **in_theirs(others))


def in_theirs(arguments):
    names = {"feature_attention_mask": "input_features_mask"}
    none = {"eos_token_id": None} if arguments.get("eos_token_id") == [] else {}  # never stop
    return {names.get(name, name): value for name, value in arguments.items()} | none


class AudioFlamingo3ForConditionalGeneration(Ours, audio.AudioFlamingo3ForConditionalGeneration):
    def get_audio_features(self, features, mask):
        return super().get_audio_features(features, mask).pooler_output


class MusicFlamingoForConditionalGeneration(Ours, music.MusicFlamingoForConditionalGeneration):
    def get_audio_features(self, features, mask, window_index):
        ids = []  # there, runs of <sound> say where a recording begins
        for index, mel_frames in zip(window_index.tolist(), mask.sum(1).tolist()):
            ids += [0] * (index == 0) + [self.config.audio_token_id] * frame_counts(mel_frames)[1]
        return super().get_audio_features(features, mask, torch.tensor([ids])).pooler_output
