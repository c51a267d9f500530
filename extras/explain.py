"""One recording's way through the model: what came out of each stage, how long it took, a picture.

explain(processor, model, "rain.wav", "What sound is this?", options={})
"""

import shutil
import time
from collections.abc import Iterable
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from af3 import AudioFlamingo3ForConditionalGeneration, frame_counts
from plumbing import terminal
from processor import N_SAMPLES, SAMPLE_RATE, AudioFlamingo3Processor, feature_batch

# From dark to bright: of a terminal's 256 colours, and as characters where it has none.
HEAT = [16, 17, 18, 54, 90, 126, 162, 198, 203, 208, 214, 220, 226, 228, 230, 231]
INK = " .:-=+*%@#"


def explain(
    processor: AudioFlamingo3Processor,
    model: AudioFlamingo3ForConditionalGeneration,
    audio: str,
    prompt: str,
    options: dict,
) -> None:
    """Prints the stages up to the first new token, the log-mel, and the answer."""
    journey = Journey()
    waveform = processor.to_waveform(audio)
    seconds = len(waveform) / SAMPLE_RATE
    journey.add("waveform", waveform.shape, f"{SAMPLE_RATE} samples a second: {seconds:.2f} s")

    # The processor computes log-mel and ids together. Here each is computed alone, for its time.
    inputs = processor(prompt, waveform)
    journey.restart_clock()
    features, mask = feature_batch(waveform.split(N_SAMPLES))
    mel_frames = mask.sum(1)
    meaning = f"{int(mel_frames.sum())} mel frames of 10 ms, padded to whole windows"
    journey.add("log-mel", features.shape, meaning)
    processor(prompt)
    ids = inputs["input_ids"]
    num_sounds = int((ids == processor.audio_token_id).sum())
    journey.add("prompt", ids.shape, f"ids in the chat template, {num_sounds} of them <sound>")

    steps = model.stream(**inputs.to(model.device), **options)
    hooks = journey.watch(model)
    first = next(steps)
    for hook in hooks:
        hook.remove()
    meaning = f"{processor.decode(first)!r}; then token by token"
    journey.add("next token", first.shape, meaning)

    print(journey.table(), end="\n\n")
    columns = min(shutil.get_terminal_size().columns - 1, 400)
    coloured = terminal.has_256_colours()
    print(picture(features, mel_frames.tolist(), columns, coloured), end="\n\n")
    terminal.print_as_it_comes(processor.stream_text(chain([first], steps)))


# ---- The table of stages ----


class Journey:
    """The stages in order, each with what came out of it, how long it took, and what it means."""

    def __init__(self):
        self.stages: dict[str, dict] = {}
        self.restart_clock()

    def restart_clock(self) -> None:
        self.clock = time.perf_counter()

    def add(self, name: str, shape: Iterable[int], meaning: str) -> None:
        """Notes a stage that has just ended. One that comes again adds its time to the first."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # otherwise only the start of the work would be timed
        new_stage = {"shape": None, "times": 0, "seconds": 0.0, "meaning": meaning}
        stage = self.stages.setdefault(name, new_stage)
        stage["shape"] = tuple(shape)
        stage["times"] += 1
        stage["seconds"] += time.perf_counter() - self.clock
        self.restart_clock()

    def watch(self, model: AudioFlamingo3ForConditionalGeneration) -> list:
        """Adds a stage whenever one of the model's parts is done. Returns hooks to be removed."""
        tower = model.audio_tower
        decoder = model.language_model.model
        outputs = [
            (tower.conv1, "conv1", "each mel frame with its two neighbours"),
            (tower.conv2, "conv2", "every other one: a conv frame is 20 ms"),
            (
                tower.layers[-1],
                f"{len(tower.layers)} encoder layers",
                "each conv frame has heard its whole window",
            ),
            (tower.layer_norm, "pool, LayerNorm", "two become one: an audio frame is 40 ms"),
            (
                model.multi_modal_projector,
                "projector",
                "the real audio frames, as wide as the decoder",
            ),
            (decoder.embed_tokens, "embedding", "the prompt's ids, looked up"),
            (
                decoder.norm,
                f"{len(decoder.layers)} decoder layers",
                "each position has heard and read all before it",
            ),
            (
                model.language_model.lm_head,
                "lm_head",
                "a score for each token that may come next",
            ),
        ]
        hooks = [self.add_output_of(*output) for output in outputs]

        def encoder_begins(module, inputs) -> None:
            self.restart_clock()

        def decoder_begins(module, inputs) -> None:
            meaning = "each <sound> slot now holds an audio frame"
            self.add("splice", inputs[0].shape, meaning)

        hooks.append(tower.register_forward_pre_hook(encoder_begins))
        hooks.append(decoder.register_forward_pre_hook(decoder_begins))
        return hooks

    def add_output_of(self, module: nn.Module, name: str, meaning: str):
        def module_is_done(module, inputs, output) -> None:
            self.add(name, output.shape, meaning)

        return module.register_forward_hook(module_is_done)

    def table(self) -> str:
        lines = [f"{'stage':18} {'shape':20} {'ms':>9}  what it means"]
        for name, stage in self.stages.items():
            shape = str(stage["shape"])
            if stage["times"] > 1:
                shape += f" and {stage['times'] - 1} more"
            milliseconds = 1000 * stage["seconds"]
            lines.append(f"{name:18} {shape:20} {milliseconds:9.2f}  {stage['meaning']}")
        return "\n".join(lines)


# ---- The picture of the log-mel ----


def picture(features: Tensor, mel_frames: list[int], columns: int, coloured: bool) -> str:
    """The real frames of windows (W, 128, 3000), low frequencies below, a border between windows,
    and under each window its number of audio frames."""
    total = sum(mel_frames)
    widths = [max(1, columns * frames // total - 1) for frames in mel_frames]
    rows = 32 if coloured else 16
    num_shades = len(HEAT) if coloured else len(INK)
    windows = []
    for window, frames, width in zip(features, mel_frames, widths):
        pooled = F.adaptive_avg_pool2d(window[None, :, :frames], (rows, width))[0]
        windows.append(pooled.flip(0))
    shades = to_shades(windows, num_shades)

    lines = []
    if coloured:
        for row in range(0, rows, 2):
            lines.append([two_rows_in_colour(w[row], w[row + 1]) for w in shades])
    else:
        for row in range(rows):
            lines.append(["".join(INK[shade] for shade in w[row]) for w in shades])
    labels = [frame_label(frames, width) for frames, width in zip(mel_frames, widths)]
    lines.append(labels)
    return "\n".join("|" + "|".join(cells) + "|" for cells in lines)


def to_shades(windows: list[Tensor], num_shades: int) -> list[list[list[int]]]:
    """Numbers from 0 for the lowest value of all windows to num_shades - 1 for the highest."""
    low = min(float(window.min()) for window in windows)
    high = max(float(window.max()) for window in windows)
    spread = max(high - low, 1e-6)
    return [((w - low) / spread * (num_shades - 1)).round().int().tolist() for w in windows]


def two_rows_in_colour(upper: list[int], lower: list[int]) -> str:
    """Two rows in one line: a half block in the colour of one, on the colour of the other."""
    cells = [f"\x1b[38;5;{HEAT[a]};48;5;{HEAT[b]}m▀" for a, b in zip(upper, lower)]
    return "".join(cells) + "\x1b[0m"


def frame_label(mel_frames: int, width: int) -> str:
    """The longest label that fits."""
    _, audio_frames = frame_counts(mel_frames)
    for label in (f" {audio_frames} audio frames ", f" {audio_frames} ", str(audio_frames), ""):
        if len(label) <= width:
            break
    return label.center(width, "-")
