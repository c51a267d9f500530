"""Compares this project numerically with transformers, on any checkpoint.

    pip install transformers==5.23.0 librosa        needed only for this
    python tools/exact.py CHECKPOINT                the largest differences over all test cases
    python tools/exact.py CHECKPOINT --layers       layer by layer: where they begin to differ

Use --layers when you change the model. It runs both models on a recording, prints the relative
difference of each stage (the largest difference over the stage's largest value), and reports the
first stage, or submodule of a layer, whose difference exceeds the tolerance.
Exits with status 1 if something differs.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
from af3 import AudioFlamingo3ForConditionalGeneration, frame_counts
from extras.music_flamingo import is_music_flamingo
from plumbing.find_checkpoint import check_is_checkpoint
from plumbing.json_file import read_json
from plumbing.terminal import exit_with
from processor import AudioFlamingo3Processor
from signals import CASES, MUSIC_CASES, conversation, sound

# Relative to the largest value of each stage.
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}

FIRST_DECODER_LAYER = "language_model.model.layers.0"


class Pair:
    """The same checkpoint loaded by transformers (the oracle) and by this project."""

    def __init__(self, checkpoint: str, dtype: torch.dtype):
        check_is_checkpoint(Path(checkpoint))
        transformers = import_transformers()
        transformers.logging.set_verbosity_error()
        self.is_music_flamingo = is_music_flamingo(read_json(Path(checkpoint) / "config.json"))
        oracle_class = transformers.AudioFlamingo3ForConditionalGeneration
        self.cases = CASES
        if self.is_music_flamingo:
            oracle_class = transformers.MusicFlamingoForConditionalGeneration
            self.cases = MUSIC_CASES
        self.oracle = oracle_class.from_pretrained(checkpoint, dtype=dtype).eval()
        self.oracle_processor = transformers.AutoProcessor.from_pretrained(checkpoint)
        self.model = AudioFlamingo3ForConditionalGeneration.from_pretrained(
            checkpoint, "cpu", dtype
        )
        self.processor = AudioFlamingo3Processor.from_pretrained(checkpoint)

    def batches(self, lengths: list[int], padding_side: str) -> tuple[dict, dict]:
        """Returns each processor's inputs for recordings of these lengths; ours include labels."""
        chats = [conversation(sound(length, seed=7)) for length in lengths]
        theirs = self.oracle_processor.apply_chat_template(
            chats,
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            processor_kwargs={"padding_side": padding_side},
        )
        ours = self.processor.apply_chat_template(
            chats, add_generation_prompt=True, padding_side=padding_side, output_labels=True
        )
        assert torch.equal(theirs["input_ids"], ours["input_ids"])
        assert torch.equal(theirs["input_features_mask"], ours["feature_attention_mask"])
        return theirs.to(dtype=self.oracle.dtype), ours

    def audio_frames(self, theirs: dict, ours: dict) -> tuple[Tensor, Tensor]:
        """Returns the projected audio frames of both models."""
        arguments = [theirs["input_features"], theirs["input_features_mask"]]
        if self.is_music_flamingo:  # it derives the windows of each recording from the ids
            arguments.append(theirs["input_ids"])
        frames = self.oracle.get_audio_features(*arguments).pooler_output
        our_frames = self.model.get_audio_features(
            ours["input_features"], ours["feature_attention_mask"], ours.get("window_index")
        )
        return frames, our_frames


def import_transformers():
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"{error}; pip install transformers==5.23.0 librosa") from None
    return transformers


# ---- The largest differences, over all cases ----


class LargestDifferences:
    """The largest difference of each kind, with its limit (design, section 4)."""

    def __init__(self):
        self.found: dict[str, tuple[float, float]] = {}

    def add(self, name: str, theirs: Tensor, ours: Tensor, limit: float) -> None:
        difference = float((theirs.float() - ours.float()).abs().max())
        known, known_limit = self.found.get(name, (0.0, limit))
        self.found[name] = (max(known, difference), max(known_limit, limit))

    def show(self) -> bool:
        """Prints the differences; returns whether all are within their limits."""
        for name, (difference, limit) in self.found.items():
            print(f"{name}: {difference:.1e}, limit {limit:.1e}")
        return all(difference <= limit for difference, limit in self.found.values())


def compare_all(pair: Pair) -> bool:
    differences = LargestDifferences()
    same = True
    for case, lengths in pair.cases.items():
        for side in ("left", "right"):
            theirs, ours = pair.batches(lengths, side)
            compare_numbers(pair, theirs, ours, side, differences)
            if side == "left":
                same = compare_tokens(pair, theirs, ours, case) and same
    return differences.show() and same


def compare_numbers(
    pair: Pair, theirs: dict, ours: dict, side: str, differences: LargestDifferences
) -> None:
    mel = theirs["input_features"]
    differences.add("log-mel", mel, ours["input_features"], limit=1e-4)
    frames, our_frames = pair.audio_frames(theirs, ours)
    limit = 1e-4 * max(1, float(frames.abs().max()))
    differences.add("audio frames", frames, our_frames, limit)

    their_output = pair.oracle(**theirs, labels=ours["labels"])
    our_output = pair.model(**ours)
    is_real = ours["attention_mask"].bool()
    logits = their_output.logits[is_real]
    limit = 1e-3 * max(1, float(logits.abs().max()) / 10)
    differences.add("logits", logits, our_output.logits[is_real], limit)
    if side == "right" or len(is_real) == 1:
        # With left padding the oracle's loss also includes first tokens predicted from padding.
        differences.add("loss", their_output.loss, our_output.loss, limit=1e-4)


def compare_tokens(pair: Pair, theirs: dict, ours: dict, case: str) -> bool:
    """Compares greedy tokens, with and without a repetition penalty, and prints the result."""
    inputs = {name: tensor for name, tensor in ours.items() if name != "labels"}
    all_same = True
    for options in (
        {"max_new_tokens": 64},
        {"max_new_tokens": 24, "repetition_penalty": 1.3},
    ):
        their_ids = pair.oracle.generate(**theirs, do_sample=False, **options)
        our_ids = pair.model.generate(**inputs, do_sample=False, **options)
        same = torch.equal(their_ids, our_ids)
        all_same = all_same and same
        verdict = "the same" if same else "DIFFER"
        print(f"{case}: greedy tokens {options} {verdict}", flush=True)
    return all_same


# ---- Layer by layer ----


def compare_layers(pair: Pair, tolerance: float) -> bool:
    """Prints each stage's difference and the first above the tolerance; returns whether none is."""
    theirs, ours = pair.batches(CASES["odd"], padding_side="left")  # one window of 1 s
    inputs = {name: tensor for name, tensor in ours.items() if name != "labels"}
    modules = dict(pair.model.named_modules())
    their_modules = rename_modules(pair.oracle)
    shared = [name for name in their_modules if name and name in modules]
    their_stages = record({name: their_modules[name] for name in shared}, pair.oracle, theirs)
    our_stages = record({name: modules[name] for name in shared}, pair.model, inputs)

    mel_frames = int(ours["feature_attention_mask"].sum())
    stages = [("log-mel", theirs["input_features"], ours["input_features"])]
    for name, their_output in their_stages.items():
        their_output = cut_to_real_frames(name, their_output, mel_frames)
        our_output = cut_to_real_frames(name, our_stages[name], mel_frames)
        stages.append((name, their_output, our_output))

    for name, their_output, our_output in stages:
        if is_whole_stage(name):
            print(f"{name:34} {distance(their_output, our_output):.1e}")
    first = first_difference(stages, tolerance)
    if first is None:
        print(f"no stage differs by more than {tolerance:.0e}")
        return True
    print(f"first difference: {first}")
    return False


def distance(theirs: Tensor, ours: Tensor) -> float:
    """Returns the largest difference over the largest value; infinity if the shapes differ."""
    if theirs.shape != ours.shape:
        return float("inf")
    largest = float(theirs.float().abs().max())
    return float((theirs.float() - ours.float()).abs().max()) / max(largest, 1e-9)


def first_difference(stages: list[tuple[str, Tensor, Tensor]], tolerance: float) -> str | None:
    """Describes the first stage, (name, their output, our output), that exceeds the tolerance.

    Stages are in the order of computation: the submodules of a layer come before the layer.
    """
    for name, theirs, ours in stages:
        if theirs.shape != ours.shape:
            return f"{name} has shape {tuple(ours.shape)}, transformers' {tuple(theirs.shape)}"
        apart = distance(theirs, ours)
        if not apart <= tolerance:  # also true for NaN
            largest = float(theirs.abs().max())
            return f"{name}: {apart:.1e} of its largest value, {largest:.3g}"
    return None


def is_whole_stage(name: str) -> bool:
    """Whether a module is a stage, not a submodule of a layer."""
    last_part = name.split(".")[-1]
    return "layers." not in name or last_part.isdigit()


def record(modules: dict[str, nn.Module], model: nn.Module, inputs: dict) -> dict[str, Tensor]:
    """Runs the model and returns the output of each module, in the order in which they finish.

    "splice" is the input of the first decoder layer.
    """
    outputs = {}

    def keep_output_as(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output) -> None:
            if not isinstance(output, Tensor):  # some of transformers' modules return tuples
                output = output[0]
            outputs[name] = output

        return hook

    def keep_splice(module: nn.Module, inputs: tuple) -> None:
        outputs["splice"] = inputs[0]

    hooks = [modules[FIRST_DECODER_LAYER].register_forward_pre_hook(keep_splice)]
    for name, module in modules.items():
        hooks.append(module.register_forward_hook(keep_output_as(name)))
    outputs["logits"] = model(**inputs).logits
    for hook in hooks:
        hook.remove()
    return outputs


def rename_modules(oracle: nn.Module) -> dict[str, nn.Module]:
    """Returns the modules of transformers' model under the names that they have in ours."""
    renamed = {}
    for name, module in oracle.named_modules():
        name = name.removeprefix("model.")
        if name.startswith("language_model"):
            name = name.replace("language_model", "language_model.model", 1)
        renamed[name] = module
    return renamed


def cut_to_real_frames(name: str, output: Tensor, mel_frames: int) -> Tensor:
    """Drops the frames of padding, which transformers computes and we do not."""
    conv_frames, audio_frames = frame_counts(mel_frames)
    if name == "audio_tower.conv1":
        return output[:, :, :mel_frames]
    if name == "audio_tower.conv2":
        return output[:, :, :conv_frames]
    if name.startswith("audio_tower.layers."):
        return output[:, :conv_frames]
    if name in ("audio_tower.layer_norm", "audio_tower"):
        return output[:, :audio_frames]
    if name.startswith("multi_modal_projector"):
        return output.reshape(-1, output.shape[-1])[:audio_frames]
    return output


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--layers", action="store_true", help="compare layer by layer")
    parser.add_argument("--dtype", choices=TOLERANCES, default="float32")
    parser.add_argument("--tolerance", type=float, help="for --layers")
    args = parser.parse_args()
    pair = Pair(args.checkpoint, getattr(torch, args.dtype))
    with torch.inference_mode():
        if args.layers:
            tolerance = args.tolerance or TOLERANCES[args.dtype]
            good = compare_layers(pair, tolerance)
        else:
            good = compare_all(pair)
    return 0 if good else 1


if __name__ == "__main__":
    exit_with(main)
