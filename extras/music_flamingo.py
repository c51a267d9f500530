"""Music Flamingo 2601 and Audio Flamingo Next (model_type musicflamingo): what they add.

They have the tensors of Audio Flamingo 3, and three differences:

    rotary time    between encoder and projector, each audio frame is rotated by angles computed
                   from its time, so that the decoder can tell when something is heard
    border ids     <|sound_bos|> before the <sound> ids of a recording, <|sound_eos|> after them
    limits         1200 s of audio, if processor_config.json does not say otherwise
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def is_music_flamingo(config: dict) -> bool:
    """Whether a config.json belongs to one of these models."""
    return config.get("model_type") == "musicflamingo"


# ---- Rotary time ----


@dataclass
class RotaryTimeConfig:
    """From the top level of config.json, whose names these are."""

    rope_theta: float = 1200.0  # base of the frequencies, and positions in a full turn
    partial_rotary_factor: float = 0.2  # 256 angles for 1280 channels; each rotates two channels
    audio_frame_step: float = 0.01  # seconds from one mel frame to the next


def rotary_time_section(config: dict) -> dict:
    """The part of config.json's top level that belongs to the rotary time embedding, or {}.

    There, rope_parameters are not the decoder's. transformers ignores head_dim and
    max_position_embeddings, and so do we.
    """
    if not is_music_flamingo(config):
        return {}
    keys = ("rope_parameters", "rope_type", "rope_theta", "partial_rotary_factor")
    keys += ("audio_frame_step", "model_type")
    return {key: config[key] for key in keys if key in config}


def read_rotary_time_config(section: dict) -> RotaryTimeConfig | None:
    """section: what `rotary_time_section` returns, without nested parameters."""
    if not is_music_flamingo(section):
        return None
    keys = ("rope_theta", "partial_rotary_factor", "audio_frame_step")
    return RotaryTimeConfig(**{key: section[key] for key in keys if key in section})


def rotary_time_embedding(config) -> "RotaryTimeEmbedding | None":
    """The module for an `AudioFlamingo3Config`; None for Audio Flamingo 3."""
    if config.rotary_time_config is None:
        return None
    return RotaryTimeEmbedding(config.rotary_time_config, config.audio_config)


class RotaryTimeEmbedding(nn.Module):
    """Rotates pairs of channels of each audio frame by angles computed from the frame's time, its
    window index, and its index in the window. It has no weights.

    For frame k in window w of a recording, at t seconds, the 256 angles are, with i from 0 to 127
    and f[i] = 1200 ** (-i / 128):

        -2 pi t f[i] w / 1200           128 angles that differ between windows
        -2 pi t f[i] k / 1200 * 2 pi    128 angles that differ between the frames of a window

    So 512 of the 1280 channels are rotated. That only the second line has another factor of 2 pi,
    and that both are multiplied by t, is the official code's choice.

    W windows, A audio frames per window, H channels, d angles.
    """

    def __init__(self, config: RotaryTimeConfig, audio_config):
        super().__init__()
        self.base = config.rope_theta
        self.num_angles = int(audio_config.hidden_size * config.partial_rotary_factor)
        self.frame_seconds = config.audio_frame_step * 4  # 0.04: conv2 halves, and so does the pool
        # 750, also for the last window of a recording, which may have fewer.
        self.window_frames = audio_config.max_source_positions // 2

    def forward(self, x: Tensor, window_index: Tensor | None, batch=slice(None)) -> Tensor:
        """x (W, A, H), rotated.

        window_index[batch] (W,) is the index of each window in its recording, 0 for the first.
        """
        if window_index is None or len(window_index[batch]) != len(x):
            raise ValueError(
                "This model needs window_index, the place of each window in its recording; "
                "pass all that its processor gives."
            )
        # Angles, cos and sin in float32, but the products in float64, as in the official code.
        # MPS has no float64.
        dtype = torch.float32 if x.device.type == "mps" else torch.float64
        angles = self.angles(window_index[batch], x.shape[1])  # (W, A, d)
        cos = angles.cos().to(dtype)
        sin = angles.sin().to(dtype)
        width = 2 * angles.shape[-1]  # the channels after these are not rotated
        pairs = x[..., :width].to(dtype).unflatten(-1, (-1, 2))  # neighbors: (W, A, d, 2)
        first, second = pairs.unbind(-1)
        rotated = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return torch.cat([rotated.flatten(-2).to(x.dtype), x[..., width:]], dim=-1)

    def angles(self, window_index: Tensor, audio_frames: int) -> Tensor:
        """Radians (W, A, d).

        They reach tens of thousands, where float32 has only two or three decimals. The model was
        trained with exactly these, so another order of the operations gives other angles.
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


# ---- Border ids ----


def read_processor_settings(
    config: dict, processor_config: dict, added_tokens: dict[str, int]
) -> dict:
    """The arguments of `AudioFlamingo3Processor` that differ; {} for Audio Flamingo 3.

    config: that of the model; {} in a folder that holds only a processor.
    """
    is_sibling = is_music_flamingo(config)
    if not config:
        is_sibling = processor_config.get("processor_class") == "MusicFlamingoProcessor"
    if not is_sibling:
        return {}
    begin_token = processor_config.get("audio_bos_token", "<|sound_bos|>")
    end_token = processor_config.get("audio_eos_token", "<|sound_eos|>")
    for token in (begin_token, end_token):
        if token not in added_tokens:
            raise ValueError(f"{token!r} is not among the added tokens of tokenizer.json.")
    return {
        "max_audio_len": 1200,  # seconds, if the file does not say otherwise
        "border_ids": (added_tokens[begin_token], added_tokens[end_token]),
    }


class Borders:
    """The ids around a recording, and the index of each window; nothing in Audio Flamingo 3."""

    def __init__(self, ids: tuple):
        self.ids = ids  # (begin, end), or ()

    def around(self, window_ids: list[list[int]]) -> list[list[int]]:
        """The <sound> ids of the windows of a recording, with the borders around them all."""
        if not self.ids or not window_ids:
            return window_ids
        begin_id, end_id = self.ids
        with_borders = [*window_ids]
        with_borders[0] = [begin_id, *with_borders[0]]
        with_borders[-1] = [*with_borders[-1], end_id]
        return with_borders

    def window_index(self, recordings: list) -> dict[str, Tensor]:
        """{"window_index": (W,)}: the index of each window in its recording, from 0."""
        if not self.ids:
            return {}
        indices = [torch.arange(len(windows)) for windows in recordings]
        return {"window_index": torch.cat(indices)}
