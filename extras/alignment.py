"""Where in the sound each word of an answer comes from: its attention to the audio frames.

    ids = model.generate(**inputs)
    new_ids = ids[0, inputs["input_ids"].shape[1] :]
    for word in align(processor, model, inputs, new_ids).words:
        print(word.begin, word.end, word.text, word.probability)

The answer is read once more, together with its prompt. Some attention heads look, whenever a word
is about to be said, at the part of the recording where it was spoken. Which heads do so is not
written anywhere. But it shows: such a head looks at one place for each word, and at later places
for later words. With the best of them, each audio frame is given to one word, in order; this is
dynamic time warping, as Whisper's word timestamps have it.

This is attention, not truth. An answer that is no transcription has attention too, and its words
are given times in the same way.
"""

import math
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from af3 import (
    AudioFlamingo3ForConditionalGeneration,
    Qwen2Attention,
    frame_counts,
    rotate_half,
    split_heads,
)
from plumbing import terminal
from processor import HOP_LENGTH, SAMPLE_RATE, AudioFlamingo3Processor, Batch

FRAME_SECONDS = 4 * HOP_LENGTH / SAMPLE_RATE  # an audio frame is four mel frames: 40 ms
KEPT_HEADS = 16  # of which the attention is kept; an official checkpoint has 784
NUM_CANDIDATES = 5  # for each token
FOLLOWS = 0.5  # the best head's score in an answer that follows the sound word by word
UNCLEAR = "no attention head points at a place for each word: some or all times mean little"


@dataclass
class Token:
    """A token of the answer, and the likeliest ones in its place, each with its probability."""

    text: str
    probability: float
    candidates: list[tuple[str, float]]


@dataclass
class Word:
    """A word of the answer. Its probability is the product of its tokens'."""

    text: str
    tokens: list[int]  # their places in the answer
    probability: float
    begin: float  # in seconds
    end: float


@dataclass
class Head:
    """An attention head, both numbers counted from 0."""

    layer: int
    head: int
    score: float  # from 0 to 1; see `head_score`
    attention: Tensor = field(repr=False)  # (new tokens, audio frames), float32


@dataclass
class Alignment:
    words: list[Word]
    tokens: list[Token]
    heads: list[Head]  # the best ones, best first
    attention: Tensor  # (new tokens, audio frames): the mean of the heads that gave the times
    num_averaged: int  # how many those are

    @property
    def follows_sound(self) -> bool:
        """Whether a head points at a place for each word, as in a transcription."""
        return self.heads[0].score >= FOLLOWS


@torch.inference_mode()
def align(
    processor: AudioFlamingo3Processor,
    model: AudioFlamingo3ForConditionalGeneration,
    inputs: Batch,
    new_ids: Tensor,
) -> Alignment:
    """The words of an answer (new tokens,) to one prompt with one recording.

    Probabilities are the model's own, before a temperature or a repetition penalty.
    """
    inputs = inputs.to(model.device)
    new_ids = torch.as_tensor(new_ids, device=model.device)
    words = split_into_words(processor, new_ids.tolist())
    first_tokens = [tokens[0] for tokens in words]
    probabilities, heads = read_again(model, inputs, new_ids, first_tokens)
    tokens = describe_tokens(processor, new_ids, probabilities)
    best = best_heads(heads)
    attention = torch.stack([head.attention for head in best]).mean(0)

    features = inputs["input_features"], inputs["feature_attention_mask"]
    spans = word_spans(attention[first_tokens].numpy(), loudness(*features).numpy())
    described = []
    for places, (begin, end) in zip(words, spans):
        text = processor.decode(new_ids[places]).strip()
        probability = float(np.prod([tokens[place].probability for place in places]))
        described.append(Word(text, places, probability, begin, end))
    return Alignment(described, tokens, heads, attention, len(best))


def as_fields(words: list[Word]) -> list[dict]:
    """The words as JSON has them, with times in seconds."""
    described = []
    for word in words:
        begin = round(word.begin, 2)
        end = round(word.end, 2)
        probability = round(word.probability, 4)
        described.append(
            {"word": word.text, "begin": begin, "end": end, "probability": probability}
        )
    return described


def print_words(alignment: Alignment) -> None:
    """A line for each word: begin and end in seconds, its probability, the word.

    Warns where the answer does not follow the sound.
    """
    for word in alignment.words:
        text = terminal.printable(word.text)
        print(f"{word.begin:8.2f} {word.end:8.2f} {word.probability:5.0%}  {text}", flush=True)
    if alignment.words and not alignment.follows_sound:
        warnings.warn(UNCLEAR)


# ---- Words and tokens ----


def split_into_words(processor: AudioFlamingo3Processor, ids: list[int]) -> list[list[int]]:
    """The places of each word's tokens in ids. A word begins with a space.

    Punctuation belongs to the word before it, and tokens such as <|im_end|> to none.
    A text without spaces is one word.
    """
    tokenizer = processor.tokenizer
    words = []
    text = b""  # of the last word
    for place, token_id in enumerate(ids):
        if token_id in tokenizer.special_ids:
            text = b""
            continue
        piece = tokenizer.decode_bytes([token_id])
        if not text or (piece[:1].isspace() and text.strip()):
            words.append([])
            text = b""
        words[-1].append(place)
        text += piece
    return [word for word in words if processor.decode([ids[place] for place in word]).strip()]


def describe_tokens(
    processor: AudioFlamingo3Processor, new_ids: Tensor, probabilities: Tensor
) -> list[Token]:
    """probabilities: (new tokens, V), from which each token was chosen."""
    likeliest, candidate_ids = probabilities.topk(NUM_CANDIDATES)
    tokens = []
    for place, token_id in enumerate(new_ids.tolist()):
        candidates = []
        for candidate_id, probability in zip(candidate_ids[place], likeliest[place]):
            candidates.append((processor.decode([candidate_id]), float(probability)))
        probability = float(probabilities[place, token_id])
        tokens.append(Token(processor.decode([token_id]), probability, candidates))
    return tokens


# ---- Attention: one pass over prompt and answer ----


def read_again(
    model: AudioFlamingo3ForConditionalGeneration,
    inputs: Batch,
    new_ids: Tensor,
    first_tokens: list[int],
) -> tuple[Tensor, list[Head]]:
    """The probabilities (new tokens, V) from which new_ids were chosen; the best heads.

    One layer's attention is held at a time, and that of the best heads so far. first_tokens are
    the places of those new tokens by which the heads are ranked.
    """
    audio_frames = model.get_audio_features(
        inputs["input_features"], inputs["feature_attention_mask"], inputs.get("window_index")
    )
    prompt = model.splice(inputs["input_ids"], audio_frames)
    # The last new token is only predicted. A <sound> among the others is embedded like any token.
    answer = model.language_model.model.embed_tokens(new_ids[None, :-1])
    x = torch.cat([prompt, answer], dim=1)  # (1, T, H)
    everything = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    is_sound = inputs["input_ids"][0] == model.config.audio_token_id
    sound_positions = is_sound.nonzero()[:, 0]
    heads = []

    def layer_begins(attention: Qwen2Attention, arguments: tuple) -> None:
        x, cos, sin, _, _ = arguments
        weights = attention_weights(attention, x, cos, sin, rows=len(new_ids))
        for number, of_head in enumerate(weights):
            to_sound = of_head[:, sound_positions].cpu()  # a copy, so that `weights` can be freed
            score = head_score(to_sound[first_tokens])
            heads.append(Head(attention.layer, number, score, to_sound))
        heads.sort(key=lambda head: head.score, reverse=True)
        del heads[KEPT_HEADS:]

    with hooks_on_attention(model, layer_begins):
        states = model.language_model.model(x, everything, cache=None)
    logits = model.language_model.lm_head(states[0, -len(new_ids) :])
    return logits.float().softmax(-1).cpu(), heads


@contextmanager
def hooks_on_attention(model: AudioFlamingo3ForConditionalGeneration, call):
    """Inside, `call` gets each decoder layer's attention and its arguments before it runs."""
    hooks = []
    for layer in model.language_model.model.layers:
        hooks.append(layer.self_attn.register_forward_pre_hook(call))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def attention_weights(
    attention: Qwen2Attention, x: Tensor, cos: Tensor, sin: Tensor, rows: int
) -> Tensor:
    """(heads, rows, T) float32: how the last positions of x (1, T, H) look at all; sums are 1.

    `F.scaled_dot_product_attention`, which the layer calls, keeps these numbers to itself.
    """
    head_dim = attention.head_dim
    q = split_heads(attention.q_proj(x[:, -rows:]), head_dim)  # (1, query heads, rows, D)
    k = split_heads(attention.k_proj(x), head_dim)  # (1, key-value heads, T, D)
    q = q * cos[:, :, -rows:] + rotate_half(q) * sin[:, :, -rows:]
    k = k * cos + rotate_half(k) * sin
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q.float() @ k.float().transpose(2, 3) * head_dim**-0.5
    tokens = x.shape[1]
    later = torch.ones(rows, tokens, dtype=torch.bool, device=x.device).triu(tokens - rows + 1)
    return scores[0].masked_fill(later, -torch.inf).softmax(-1)


# ---- Heads ----

CONCENTRATED_WITHIN = 5  # audio frames to either side of the largest weight: 0.2 s
NEARLY_BEST = 0.95  # of the best head's score: such a head takes part in the average
MOST_AVERAGED = 4


def head_score(attention: Tensor) -> float:
    """How well a head's attention (words, audio frames) points at a place for each word: 0 to 1.

    It is the product of two means, for which no labels are needed:
    concentrated: of a word's attention, the share within 0.2 s of its largest weight;
    monotonic: of all pairs of words, the share of which the later one has it at a later frame.
    """
    words, frames = attention.shape
    if words == 0:
        return 0.0
    peaks = attention.argmax(1)
    near_peak = (torch.arange(frames) - peaks[:, None]).abs() <= CONCENTRATED_WITHIN
    concentrated = float((attention * near_peak).sum(1).mean())
    if words == 1:
        return concentrated
    first, second = torch.triu_indices(words, words, offset=1)
    monotonic = float((peaks[first] < peaks[second]).float().mean())
    return concentrated * monotonic


def best_heads(heads: list[Head]) -> list[Head]:
    """The best of heads, which are in order, and those that are nearly as good; four at most."""
    nearly_best = [head for head in heads if head.score >= NEARLY_BEST * heads[0].score]
    return nearly_best[:MOST_AVERAGED]


# ---- Times ----

SMOOTHING = 2.0  # audio frames: the standard deviation of the bell that attention is smoothed by
FLOOR = 1e-4  # below this share of a word's attention, a frame may as well be another word's
QUIET = 30.0  # dB below the loudest frame of a word: at its ends, this is silence


def word_spans(attention: np.ndarray, decibels: np.ndarray) -> list[tuple[float, float]]:
    """Begin and end of each word in seconds, from attention (words, audio frames).

    Each frame goes to one word. A pause between two words would be shared by both; so quiet frames
    at either end of a word are taken off. decibels: (audio frames,)
    """
    words, frames = attention.shape
    if words == 0:
        return []
    # Where there are more words than frames, several words share one.
    parts = math.ceil(words / frames)
    scores = np.log(smooth(normalize(attention)) + FLOOR)
    # A frame at which no word looks goes to the one that looks nearby.
    distance = np.abs(np.arange(frames) - attention.argmax(1)[:, None])
    scores -= 0.001 * distance
    word_of_frame = monotonic_path(scores.repeat(parts, axis=1))
    decibels = decibels.repeat(parts)
    spans = []
    for word in range(words):
        own = np.flatnonzero(word_of_frame == word)
        loud = own[decibels[own] >= decibels[own].max() - QUIET]
        begin = loud[0] / parts * FRAME_SECONDS
        end = (loud[-1] + 1) / parts * FRAME_SECONDS
        spans.append((float(begin), float(end)))
    return spans


def normalize(attention: np.ndarray) -> np.ndarray:
    """Rows of sum 1: some words look more at the prompt than at the sound."""
    return attention / np.maximum(attention.sum(1, keepdims=True), 1e-20)


def smooth(rows: np.ndarray) -> np.ndarray:
    """Each row convolved with a bell: a head looks at the middle of a word, not at all of it."""
    reach = int(3 * SMOOTHING)
    bell = np.exp(-0.5 * (np.arange(-reach, reach + 1) / SMOOTHING) ** 2)
    bell /= bell.sum()
    frames = rows.shape[1]
    return np.stack([np.convolve(row, bell)[reach : reach + frames] for row in rows])


def monotonic_path(scores: np.ndarray) -> np.ndarray:
    """The row for each column of scores (rows, columns) that gives the largest sum.

    It starts at the first row, ends at the last, and from a column to the next it stays or goes on
    by one: so every row has a column, and there must be no fewer columns than rows.
    """
    rows, columns = scores.shape
    total = np.full(rows, -np.inf)  # the largest sum that ends at this row, up to this column
    total[0] = scores[0, 0]
    goes_on = np.zeros((columns, rows), dtype=bool)  # whether the best way came from the row before
    for column in range(1, columns):
        from_row_before = np.concatenate([[-np.inf], total[:-1]])
        goes_on[column] = from_row_before > total
        total = np.maximum(total, from_row_before) + scores[:, column]

    path = np.empty(columns, dtype=int)
    row = rows - 1
    for column in reversed(range(columns)):
        path[column] = row
        row -= int(goes_on[column, row])
    return path


def loudness(input_features: Tensor, feature_attention_mask: Tensor) -> Tensor:
    """(audio frames of all windows,) in dB, from log-mel windows (W, mel bins, mel frames)."""
    _, audio_frames = frame_counts(feature_attention_mask.sum(1))
    decibels = []
    for window, frames in zip(input_features, audio_frames.tolist()):
        log = 4 * window[:, : 4 * frames].float() - 4  # as before the last step of `log_mel`
        power = 10**log
        power = power.sum(0).unflatten(0, (frames, 4)).mean(1)
        decibels.append(10 * power.log10())
    return torch.cat(decibels).cpu()
