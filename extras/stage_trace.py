"""The stages from a recording and a prompt to the first new token: shapes, times, meanings.

journey = follow(processor, model, waveform, "What sound is this?", options={})
print(stage_table(journey.stages))
print("".join(processor.stream_text(journey.steps)))
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from af3 import AudioFlamingo3ForConditionalGeneration, frame_counts
from plumbing.transformers_conventions import Batch
from processor import N_MEL_FRAMES, N_SAMPLES, SAMPLE_RATE, AudioFlamingo3Processor, feature_batch


@dataclass
class Stage:
    name: str
    shape: tuple[int, ...]  # of the output
    seconds: float  # that it took
    meaning: str


@dataclass
class Journey:
    inputs: Batch  # of the prompt and the recording
    stages: list[Stage]  # in order, up to the first new token
    steps: Iterator[Tensor]  # the new ids, each (1,), from the first one on


def follow(
    processor: AudioFlamingo3Processor,
    model: AudioFlamingo3ForConditionalGeneration,
    waveform: Tensor,
    prompt: str,
    options: dict,
) -> Journey:
    """Runs the model on a recording (n,) at 16 kHz and a prompt, up to the first new token."""
    watch = StageWatch()
    seconds = len(waveform) / SAMPLE_RATE
    watch.add("waveform", waveform.shape, f"{SAMPLE_RATE} samples a second: {seconds:.2f} s")

    # The processor computes log-mel and ids together. Here each is computed alone, to time it.
    inputs = processor(prompt, waveform)
    watch.restart_clock()
    features, mask = feature_batch(waveform.split(N_SAMPLES))
    meaning = f"{int(mask.sum())} mel frames of 10 ms, padded to whole windows"
    watch.add("log-mel", features.shape, meaning)
    watch.prompt_shape = tuple(inputs["input_ids"].shape)
    processor(prompt)
    ids = inputs["input_ids"]
    num_sounds = int((ids == processor.audio_token_id).sum())
    watch.add("prompt", ids.shape, f"ids in the chat template, {num_sounds} of them <sound>")

    steps = model.stream(**inputs.to(model.device), **options)
    hooks = watch.hook_into(model)
    try:
        first = next(steps)
    finally:
        for hook in hooks:
            hook.remove()
    watch.add("next token", first.shape, f"{processor.decode(first)!r}; then token by token")
    return Journey(inputs, watch.stages, chain([first], steps))


class StageWatch:
    """Records stages as they end.

    The encoder's occur once for each part of a recording, the decoder's for each part of a prompt.
    """

    def __init__(self):
        self.prompt_shape: tuple[int, ...] = ()
        self.stages: list[Stage] = []
        self.restart_clock()

    def restart_clock(self) -> None:
        self.clock = time.perf_counter()

    def add(self, name: str, shape: Iterable[int], meaning: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # otherwise only the start of the work would be timed
        seconds = time.perf_counter() - self.clock
        self.stages.append(Stage(name, tuple(shape), seconds, meaning))
        self.restart_clock()

    def hook_into(self, model: AudioFlamingo3ForConditionalGeneration) -> list:
        """Makes each part of the model add a stage when it is done. Returns hooks to be removed."""
        tower = model.audio_tower
        decoder = model.language_model.model
        outputs = [
            (tower.conv1, "conv1", "each mel frame with its two neighbors"),
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
        if model.rotary_time is not None:  # in Music Flamingo and Audio Flamingo Next
            meaning = "each audio frame, rotated by its time"
            outputs.append((model.rotary_time, "rotary time", meaning))
        hooks = [self.add_output_of(*output) for output in outputs]

        def encoder_begins(module, inputs) -> None:
            self.restart_clock()

        def decoder_begins(module, inputs) -> None:
            if all(stage.name != "splice" for stage in self.stages):  # not at later parts
                shape = (*self.prompt_shape, inputs[0].shape[-1])
                self.add("splice", shape, "each <sound> slot now holds an audio frame")

        hooks.append(tower.register_forward_pre_hook(encoder_begins))
        hooks.append(decoder.register_forward_pre_hook(decoder_begins))
        return hooks

    def add_output_of(self, module: nn.Module, name: str, meaning: str):
        def module_is_done(module, inputs, output) -> None:
            self.add(name, output.shape, meaning)

        return module.register_forward_hook(module_is_done)


def stage_table(stages: list[Stage]) -> str:
    lines = [f"{'stage':18} {'shape':20} {'ms':>9}  what it means"]
    for stage in stages:
        milliseconds = 1000 * stage.seconds
        lines.append(f"{stage.name:18} {stage.shape!s:20} {milliseconds:9.2f}  {stage.meaning}")
    return "\n".join(lines)


# ---- Frames and the prompt in words ----


def describe_frames(mel_frames: int) -> str:
    """Explains how a window's mel frames become conv frames and audio frames."""
    conv_frames, audio_frames = frame_counts(mel_frames)
    last = 2 * conv_frames - 2  # the mel frame in the middle of the last conv frame
    text = (
        f"{mel_frames} mel frames become {conv_frames} conv frames, because conv2 takes every "
        f"other one, 0, 2, 4 and so on up to {last}, with its neighbors. "
    )
    if last + 2 < N_MEL_FRAMES:
        text += f"The last sees mel frames up to {last + 2}, so conv1 is computed for {last + 3}. "
    text += f"{conv_frames} become {audio_frames} audio frames, because the pool makes one of two"
    if conv_frames % 2:
        text += " and drops an odd last one"
    return text + "."


def fold_prompt(processor: AudioFlamingo3Processor, ids: Tensor) -> list[tuple[str, int]]:
    """The tokens of a prompt (T,) with their counts; only a run of <sound> is folded into one."""
    folded = []
    last_id = None
    for token_id in ids.tolist():
        if token_id == last_id == processor.audio_token_id:
            text, count = folded.pop()
            folded.append((text, count + 1))
        else:
            folded.append((processor.decode([token_id]), 1))
        last_id = token_id
    return folded
