"""Word timestamps: finds the part of the recording that each word of an answer attends to.

    ids = model.generate(**inputs)
    new_ids = ids[0, inputs["input_ids"].shape[1] :]
    for word in align(processor, model, inputs, new_ids).words:
        print(word.begin, word.end, word.text, word.probability)

Prompt and answer are passed through the model once more. When the next token begins a word, some
attention heads attend to the part of the recording where that word is spoken. No list says which
heads these are, but they can be recognized: such a head attends to one place for each word, and to
later places for later words. The best heads then assign each audio frame to one word, in order, by
dynamic time warping, as in Whisper's word timestamps.

Attention is a hint, not proof: the words of an answer that is not a transcription also get times.

Times count from the beginning of the sound. If that of a film begins late or has gaps, which
`find_gaps` in plumbing/timeline.py finds, the times in the film are later.
"""

import math
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from af3 import (
    POOL_SIZE,
    AudioFlamingo3ForConditionalGeneration,
    Qwen2Attention,
    frame_counts,
    rotate_half,
    split_heads,
)
from plumbing import terminal
from plumbing.timeline import Gap, on_timeline
from plumbing.transformers_conventions import Batch
from processor import HOP_LENGTH, SAMPLE_RATE, AudioFlamingo3Processor

FRAME_MELS = 2 * POOL_SIZE  # mel frames in an audio frame: conv2 halves them, then the pool
FRAME_SECONDS = FRAME_MELS * HOP_LENGTH / SAMPLE_RATE  # an audio frame is four mel frames: 40 ms
KEPT_HEADS = 16  # heads whose attention is kept; an official checkpoint has 784
NUM_CANDIDATES = 5  # for each token
FOLLOWS = 0.5  # the best head's minimum score in an answer that follows the sound word by word
UNCLEAR = "no attention head points at a place for each word: some or all times mean little"


@dataclass
class Token:
    """A token of the answer, and the likeliest candidates for its position, with probabilities."""

    text: str
    probability: float
    candidates: list[tuple[str, float]]


@dataclass
class Word:
    """A word of the answer. Its probability is the product of its tokens' probabilities."""

    text: str
    tokens: list[int]  # their positions in the answer
    probability: float
    begin: float  # in seconds
    end: float


@dataclass
class Head:
    """An attention head. `layer` and `head` are counted from 0."""

    layer: int
    head: int
    score: float  # from 0 to 1; see `head_score`
    attention: Tensor = field(repr=False)  # (new tokens, audio frames), float32


@dataclass
class Alignment:
    words: list[Word]
    tokens: list[Token]
    heads: list[Head]  # the best ones, best first
    attention: Tensor  # (new tokens, audio frames): the mean of the heads used for the times
    num_averaged: int  # how many heads that is

    @property
    def follows_sound(self) -> bool:
        """Whether some head points at a place for each word, as in a transcription."""
        return self.heads[0].score >= FOLLOWS


@torch.inference_mode()
def align(
    processor: AudioFlamingo3Processor,
    model: AudioFlamingo3ForConditionalGeneration,
    inputs: Batch,
    new_ids: Tensor,
    gaps: Sequence[Gap] = (),
) -> Alignment:
    """Aligns an answer (new tokens,) to one prompt with the prompt's one recording.

    Probabilities are the model's own, before temperature and repetition penalty. gaps: those of
    the film that the recording is the sound of; times are then times in the film.
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
        described.append(Word(text, places, probability, *on_timeline(begin, end, gaps)))
    return Alignment(described, tokens, heads, attention, len(best))


def as_fields(words: list[Word]) -> list[dict]:
    """The words as JSON objects, with times in seconds."""
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
    """Prints a line for each word: begin and end in seconds, probability, text.

    Warns if the answer does not follow the sound.
    """
    for word in alignment.words:
        text = terminal.printable(word.text)
        print(f"{word.begin:8.2f} {word.end:8.2f} {word.probability:5.0%}  {text}", flush=True)
    if alignment.words and not alignment.follows_sound:
        warnings.warn(UNCLEAR)


# ---- Words and tokens ----


def split_into_words(processor: AudioFlamingo3Processor, ids: list[int]) -> list[list[int]]:
    """The positions in ids of each word's tokens. A word begins with a space.

    Punctuation belongs to the preceding word. Special tokens, for example <|im_end|>, belong to no
    word. A text without spaces is one word.
    """
    tokenizer = processor.tokenizer
    words = []
    text = b""  # the last word so far
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
    """probabilities: (new tokens, V), the distributions that the tokens were chosen from."""
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
    """The probabilities (new tokens, V) that new_ids were chosen from, and the best heads.

    Only one layer's attention, and that of the best heads so far, is in memory at a time. Heads are
    scored by the new tokens at the positions first_tokens.
    """
    prompt_and_audio = {name: value for name, value in inputs.items() if name != "attention_mask"}
    prompt = model.embed(**prompt_and_audio)
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
    logits = logits[:, : model.config.num_tokens]  # those that have a text
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
    """(heads, rows, T) float32: attention weights of the last `rows` positions of x (1, T, H).

    `F.scaled_dot_product_attention`, which the layer calls, does not return them.
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
NEARLY_BEST = 0.95  # of the best head's score: heads above this are averaged
MOST_AVERAGED = 4


def head_score(attention: Tensor) -> float:
    """How well a head's attention (words, audio frames) points at a place for each word: 0 to 1.

    The score needs no labels. It is the product of two shares:
    concentrated: the mean share of a word's attention within 0.2 s of its largest weight;
    monotonic: the share of word pairs in which the later word peaks at a later frame.
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
    """The best of `heads`, which are sorted, and those nearly as good; at most four."""
    nearly_best = [head for head in heads if head.score >= NEARLY_BEST * heads[0].score]
    return nearly_best[:MOST_AVERAGED]


# ---- Times ----

SMOOTHING = 2.0  # audio frames: the standard deviation of the Gaussian that smooths attention
FLOOR = 1e-4  # much smaller shares of a word's attention count as zero
QUIET = 30.0  # dB below a word's loudest frame: frames this quiet at its ends are silence


def word_spans(attention: np.ndarray, decibels: np.ndarray) -> list[tuple[float, float]]:
    """Begin and end of each word in seconds, from attention (words, audio frames).

    Each frame is assigned to one word. Two words would divide the pause between them, so quiet
    frames at either end of a word are trimmed. decibels: (audio frames,)
    """
    words, frames = attention.shape
    if words == 0:
        return []
    # If there are more words than frames, several words share a frame.
    parts = math.ceil(words / frames)
    scores = np.log(smooth(normalize(attention)) + FLOOR)
    # A frame that no word attends to goes to the word that attends nearest to it.
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
    """Makes each row sum to 1: some words attend more to the prompt than to the sound."""
    return attention / np.maximum(attention.sum(1, keepdims=True), 1e-20)


def smooth(rows: np.ndarray) -> np.ndarray:
    """Convolves rows with a Gaussian: heads attend to the middle of a word, not to all of it."""
    reach = int(3 * SMOOTHING)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / SMOOTHING) ** 2)
    kernel /= kernel.sum()
    frames = rows.shape[1]
    return np.stack([np.convolve(row, kernel)[reach : reach + frames] for row in rows])


def monotonic_path(scores: np.ndarray) -> np.ndarray:
    """The path, a row for each column, with the largest sum of scores (rows, columns).

    It starts at the first row, ends at the last, and from one column to the next stays in its row
    or advances by one. So it visits every row; there must be at least as many columns as rows.
    """
    rows, columns = scores.shape
    total = np.full(rows, -np.inf)  # the largest sum of a path that ends at this row
    total[0] = scores[0, 0]
    advances = np.zeros((columns, rows), dtype=bool)  # whether the best path moved down a row
    for column in range(1, columns):
        from_row_before = np.concatenate([[-np.inf], total[:-1]])
        advances[column] = from_row_before > total
        total = np.maximum(total, from_row_before) + scores[:, column]

    path = np.empty(columns, dtype=int)
    row = rows - 1
    for column in reversed(range(columns)):
        path[column] = row
        row -= int(advances[column, row])
    return path


def loudness(input_features: Tensor, feature_attention_mask: Tensor) -> Tensor:
    """Loudness in dB, (audio frames of all windows,), of log-mel (W, mel bins, mel frames)."""
    _, audio_frames = frame_counts(feature_attention_mask.sum(1))
    decibels = []
    for window, frames in zip(input_features, audio_frames.tolist()):
        log = 4 * window[:, : FRAME_MELS * frames].float() - 4  # undoes the last step of `log_mel`
        power = 10**log
        power = power.sum(0).unflatten(0, (frames, FRAME_MELS)).mean(1)
        decibels.append(10 * power.log10())
    return torch.cat(decibels).cpu()
