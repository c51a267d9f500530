"""How one recording is answered, in the terminal: stages, answer, what each word attends to.

explain(processor, model, "rain.wav", "What sound is this?", options={})
"""

import shutil
import textwrap
from collections.abc import Sequence
from itertools import tee

import torch
import torch.nn.functional as F
from torch import Tensor

from af3 import AudioFlamingo3ForConditionalGeneration, frame_counts
from extras.alignment import UNCLEAR, Alignment, align
from extras.stage_trace import describe_frames, fold_prompt, follow, stage_table
from plumbing import terminal
from plumbing.timeline import Gap, find_gaps, on_timeline
from processor import SAMPLE_RATE, WINDOW_SECONDS, AudioFlamingo3Processor, mel_edges

# From dark to bright: colors of a 256-color terminal, and characters for other terminals.
HEAT = [16, 17, 18, 54, 90, 126, 162, 198, 203, 208, 214, 220, 226, 228, 230, 231]
INK = " .:-=+*%@#"

PICTURE_LINES = 16
LABEL_WIDTH = 10  # the labels to the left of the picture


def explain(
    processor: AudioFlamingo3Processor,
    model: AudioFlamingo3ForConditionalGeneration,
    audio: str | Tensor,
    prompt: str,
    options: dict,
    gaps: Sequence[Gap] = (),
) -> None:
    """Prints the stages up to the first new token, the prompt, the answer, the log-mel, the
    attention of each word to it, and the candidates for each token. gaps: as for `align`."""
    columns = min(shutil.get_terminal_size().columns - 1, 400)
    waveform = processor.to_waveform(audio)
    if isinstance(audio, str):
        gaps = find_gaps(audio, len(waveform) / SAMPLE_RATE)
    journey = follow(processor, model, waveform, prompt, options)
    inputs = journey.inputs
    mel_frames = inputs["feature_attention_mask"].sum(1).tolist()
    print(stage_table(journey.stages), end="\n\n")
    for frames in sorted(set(mel_frames), reverse=True):
        print(textwrap.fill(describe_frames(frames), columns))
    print(f"\nThe prompt:\n{prompt_tokens(processor, inputs['input_ids'][0], columns)}\n")

    print("The answer:")
    steps, steps_again = tee(journey.steps)
    terminal.print_as_it_comes(processor.stream_text(steps))
    alignment = align(processor, model, inputs, torch.cat(list(steps_again)), gaps)

    print(f"\nWhere each word looked: {describe_heads(alignment)}")
    features = inputs["input_features"].cpu()
    colored = terminal.has_256_colors()
    print(picture(features, mel_frames, columns, colored, gaps))
    for line in attention_lines(alignment, mel_frames, columns):
        print(line)
    print("\n" + token_table(alignment))


# ---- In words ----


def prompt_tokens(processor: AudioFlamingo3Processor, ids: Tensor, columns: int) -> str:
    """The prompt's tokens in quotes, in lines of at most `columns` characters if possible."""
    lines = [""]
    for text, count in fold_prompt(processor, ids):
        token = repr(text)
        if count > 1:
            token += f" x {count}"
        if lines[-1] and len(lines[-1]) + 1 + len(token) > columns:
            lines.append("")
        lines[-1] = f"{lines[-1]} {token}".strip()
    return "\n".join(lines)


def describe_heads(alignment: Alignment) -> str:
    """The heads whose attention is averaged, and a remark if it means little."""
    best = alignment.heads[: alignment.num_averaged]
    names = [f"layer {head.layer + 1}, head {head.head + 1}" for head in best]
    text = f"{' and '.join(names)}, score {best[0].score:.2f} of 1"
    if alignment.words and not alignment.follows_sound:
        text += f"\n({UNCLEAR})"
    return text


def token_table(alignment: Alignment) -> str:
    """A table of the tokens: probability, seconds, and the next likeliest candidates."""
    seconds_of = {}
    for word in alignment.words:
        seconds_of[word.tokens[0]] = f"{word.begin:.2f} to {word.end:.2f}"
    lines = [f"{'token':16} {'probability':>11}  {'seconds':16} next likeliest"]
    for place, token in enumerate(alignment.tokens):
        others = []
        for text, probability in token.candidates:
            if text != token.text and len(others) < 3:
                others.append(f"{text!r} {probability:.2%}")
        seconds = seconds_of.get(place, "")
        line = f"{token.text!r:16} {token.probability:>11.2%}  {seconds:16} {', '.join(others)}"
        lines.append(line.rstrip())
    return "\n".join(lines)


# ---- The picture: log-mel windows, and below them a line of attention for each word ----


def picture(
    features: Tensor,
    mel_frames: list[int],
    columns: int,
    colored: bool,
    gaps: Sequence[Gap] = (),
) -> str:
    """Draws the real frames of windows (W, 128, 3000), with Hz on the left and seconds below.

    Low frequencies are at the bottom. Windows are separated by a border; below each window is its
    number of audio frames.
    """
    widths = window_widths(mel_frames, columns)
    rows = 2 * PICTURE_LINES if colored else PICTURE_LINES
    num_shades = len(HEAT) if colored else len(INK)
    windows = []
    for window, frames, width in zip(features, mel_frames, widths):
        pooled = F.adaptive_avg_pool2d(window[None, :, :frames], (rows, width))[0]
        windows.append(pooled.flip(0))
    shades = to_shades(windows, num_shades)

    lines = []
    labels = frequency_labels()
    for line in range(PICTURE_LINES):
        if colored:
            cells = [two_rows_in_color(w[2 * line], w[2 * line + 1]) for w in shades]
        else:
            cells = ["".join(INK[shade] for shade in w[line]) for w in shades]
        lines.append(framed(labels[line], cells))
    frame_counts_below = [frame_label(frames, width) for frames, width in zip(mel_frames, widths)]
    lines.append(framed("", frame_counts_below))
    lines.append(framed("seconds", time_axis(mel_frames, widths, gaps)))
    return "\n".join(lines)


def framed(label: str, cells: list[str]) -> str:
    """A line of the picture: its label and the cells of each window."""
    if len(label) >= LABEL_WIDTH:
        label = label[: LABEL_WIDTH - 2] + "~"
    return f"{label:>{LABEL_WIDTH - 1}} |{'|'.join(cells)}|"


def window_widths(mel_frames: list[int], columns: int) -> list[int]:
    """The number of columns for each window, without the border on its right."""
    total = sum(mel_frames)
    free = columns - LABEL_WIDTH - 1
    return [max(1, free * frames // total - 1) for frames in mel_frames]


def to_shades(windows: list[Tensor], num_shades: int) -> list[list[list[int]]]:
    """Integers from 0, for the lowest value of all windows, to num_shades - 1, for the highest."""
    low = min(float(window.min()) for window in windows)
    high = max(float(window.max()) for window in windows)
    spread = max(high - low, 1e-6)
    return [((w - low) / spread * (num_shades - 1)).round().int().tolist() for w in windows]


def two_rows_in_color(upper: list[int], lower: list[int]) -> str:
    """Two rows in one line: an upper half block in one color, with the other as background."""
    cells = [f"\x1b[38;5;{HEAT[a]};48;5;{HEAT[b]}m▀" for a, b in zip(upper, lower)]
    return "".join(cells) + "\x1b[0m"


def frequency_labels() -> list[str]:
    """A label for each line of the picture: a round number of Hz if one falls into the line."""
    labels = [""] * PICTURE_LINES
    edges = mel_edges()
    for frequency in (100, 500, 1000, 2000, 4000, 8000):
        height = float((edges < frequency).sum()) / len(edges)  # from 0, below, to 1
        line = int((1 - height) * PICTURE_LINES)
        labels[line] = f"{frequency} Hz"
    return labels


def frame_label(mel_frames: int, width: int) -> str:
    """The longest label that fits."""
    _, audio_frames = frame_counts(mel_frames)
    long_label = terminal.plural(audio_frames, "audio frame")
    for label in (f" {long_label} ", f" {audio_frames} ", str(audio_frames), ""):
        if len(label) <= width:
            break
    return label.center(width, "-")


def time_axis(mel_frames: list[int], widths: list[int], gaps: Sequence[Gap] = ()) -> list[str]:
    """A time axis for each window, in seconds of the film. Each number begins at its time."""
    columns_a_second = 100 * sum(widths) / sum(mel_frames)
    for step in (0.1, 0.2, 0.5, 1, 2, 5, 10, 30):
        if step * columns_a_second >= 6:
            break
    cells = []
    for window, (frames, width) in enumerate(zip(mel_frames, widths)):
        axis = ""
        for tick in range(int(frames / 100 / step) + 1):
            column = round(tick * step * 100 / frames * width)
            time = window * WINDOW_SECONDS + tick * step
            label = f"{round(on_timeline(time, time, gaps)[0], 2):g}"
            if len(axis) <= column <= width - len(label):
                axis = axis.ljust(column) + label
        cells.append(axis.ljust(width))
    return cells


def attention_lines(alignment: Alignment, mel_frames: list[int], columns: int) -> list[str]:
    """A line for each word: the denser a character, the more attention, relative to the peak."""
    widths = window_widths(mel_frames, columns)
    _, audio_frames = frame_counts(torch.tensor(mel_frames))
    lines = []
    for word in alignment.words:
        attention = alignment.attention[word.tokens[0]]
        shades = attention / attention.max().clamp(min=1e-20) * (len(INK) - 1)
        cells = []
        for of_window, width in zip(shades.split(audio_frames.tolist()), widths):
            if len(of_window) == 0:  # a last window of one or two mel frames
                cells.append(" " * width)
                continue
            pooled = F.adaptive_max_pool1d(of_window[None, None], width)[0, 0]
            cells.append("".join(INK[round(shade)] for shade in pooled.tolist()))
        lines.append(framed(terminal.printable(word.text), cells))
    return lines
