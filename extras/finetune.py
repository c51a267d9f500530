"""Fine-tunes the model on examples, with LoRA or in full, using only PyTorch.

    python -m extras.finetune train.jsonl --model MODEL --output DIR
    python -m extras.finetune train.jsonl --model MODEL --output DIR --resume
    torchrun --nproc-per-node 2 -m extras.finetune train.jsonl --model MODEL --output DIR

A line of train.jsonl: {"audio": "a.wav", "prompt": "Who speaks?", "answer": "theo"}.
The loss is the cross-entropy of the answer's tokens and of the end of the turn. The prompts do not
count: a model that also learns to predict its prompts stops following them.

With LoRA the weights are frozen, and two low-rank matrices for each are trained (lora.py). DIR then
contains an adapter in `peft`'s format, for `generate.py --adapter DIR` and for transformers. With
--full all weights are trained, and DIR contains a whole checkpoint.

From Python: `finetune(model, processor, examples, "DIR", Settings(epochs=1))`.
Letters in shapes: B rows of a batch, T tokens, H hidden size, N answer tokens in the batch.
"""

import argparse
import hashlib
import json
import math
import os
import random
import statistics
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from af3 import AudioFlamingo3ForConditionalGeneration
from extras.lora import DECODER_LINEARS, HEAD, add_factors, choose_layers, save_adapter
from extras.many_recordings import (
    OWN_FIELDS,
    check_no_faults,
    count_audio_frames,
    load_one,
    new_job,
    read_entries,
    warn_about_missing_prompts,
    with_choices,
)
from plumbing import terminal
from plumbing.check_checkpoint import is_quantized
from plumbing.check_inputs import check_length
from plumbing.processes import is_first_process, num_processes, process_number
from plumbing.save_checkpoint import check_can_save, new_files
from plumbing.transformers_conventions import Batch
from processor import AudioFlamingo3Processor

STATE_FILE = "training_state.pt"
SHOWN_ANSWERS = 4  # held-out examples whose answers a report prints


@dataclass
class Settings:
    """All settings that affect the trained weights. A run is resumed with the same ones only."""

    model: str | None = None  # the name of the checkpoint, written into the adapter
    rank: int = 16  # rows of A, columns of B
    alpha: float = 32.0  # scale = alpha / rank
    targets: tuple[str, ...] = DECODER_LINEARS  # linear layers of the decoder that get factors
    projector: bool = False  # whether the projector's two layers get factors too
    full: bool = False  # train all weights instead
    epochs: int = 3
    batch_size: int = 8  # examples in a step, on each process
    learning_rate: float = 2e-4  # at the peak
    warmup: float = 0.05  # the fraction of the steps in which the learning rate rises
    held_out: float = 0.05  # the fraction of the examples that is not trained on
    seed: int = 0

    def __post_init__(self):
        check_settings(self)


# ---- Examples ----


@dataclass
class Example:
    messages: list[dict]  # the question with its recordings, then the answer
    answer: str
    length: int  # in tokens, audio frames among them


def read_examples(path: str, processor: AudioFlamingo3Processor, max_tokens: int) -> list[Example]:
    """Reads the examples in a file of JSON lines or a JSON array, and each recording once.

    Raises ValueError with the numbers of bad lines. max_tokens is the model's limit.
    """
    examples = []
    faults = []
    entries = read_entries(path)
    progress = terminal.Progress(len(entries), quiet=not is_first_process())
    for number, (place, entry) in enumerate(entries, start=1):
        try:
            examples.append(read_example(entry, place, path, processor, max_tokens))
        except (ValueError, OSError, RuntimeError) as error:
            fault = terminal.describe_error(error)
            faults.append(fault if terminal.one_line(place) in fault else f"{place}: {fault}")
        progress.show(number)
    progress.clear()
    check_no_faults(faults)
    if is_first_process():
        default_prompt = processor.default_transcription_prompt
        warn_about_missing_prompts(entries, OWN_FIELDS["prompt"], default_prompt, path)
    return examples


def read_example(
    entry, place: str, path: str, processor: AudioFlamingo3Processor, max_tokens: int
) -> Example:
    prompt = AudioFlamingo3Processor.default_transcription_prompt
    job = new_job(entry, prompt, OWN_FIELDS, place, path)
    answer = entry.get("answer")
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError(f'{place}: "answer" is {json.dumps(answer)}; text is expected.')
    if processor.audio_token in job.prompt:
        raise ValueError(f"{place}: leave out {processor.audio_token}; the audio comes first.")
    content = []
    num_frames = 0
    for file in job.recordings:
        num_frames += count_audio_frames(load_one(file, processor))
        content.append({"type": "audio", "path": file})
    content.append({"type": "text", "text": with_choices(job.prompt, job.choices)})
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    text = processor.apply_chat_template(messages, tokenize=False)  # a <sound> for each recording
    ids = processor.tokenizer.encode_pieces(processor.tokenizer.split_added_tokens(text))
    length = len(ids) - len(job.recordings) + num_frames
    check_length(length, 0, max_tokens)
    return Example(messages, answer, length)


def hold_out(examples: list[Example], settings: Settings) -> tuple[list[Example], list[Example]]:
    """Splits the examples into those to train on and those held out for evaluation."""
    count = math.ceil(settings.held_out * len(examples))
    shuffled = random.Random(settings.seed).sample(examples, len(examples))
    return shuffled[count:], shuffled[:count]


def plan_batches(
    examples: list[Example], batch_size: int, settings: Settings
) -> list[list[Example]]:
    """The batch of each training step, planned in advance so that a run can be resumed.

    Each epoch shuffles the examples, and sorts every 16 batches by length to reduce padding.
    Examples that do not fill a batch are left out of the epoch.
    """
    plan = []
    for epoch in range(settings.epochs):
        rng = random.Random(f"{settings.seed} {epoch}")
        shuffled = rng.sample(examples, len(examples) // batch_size * batch_size)
        batches = []
        for start in range(0, len(shuffled), 16 * batch_size):
            pool = shuffled[start : start + 16 * batch_size]
            pool.sort(key=lambda example: example.length)
            for first in range(0, len(pool), batch_size):
                batches.append(pool[first : first + batch_size])
        plan += rng.sample(batches, len(batches))
    return plan


def make_batch(examples: list[Example], processor: AudioFlamingo3Processor) -> Batch:
    chats = [with_waveforms(example.messages, processor) for example in examples]
    return processor.apply_chat_template(chats, output_labels="answer")


def with_waveforms(messages: list[dict], processor: AudioFlamingo3Processor) -> list[dict]:
    """The messages of an example with its recordings loaded.

    Nothing is said about them: `read_examples` has already shown the warnings.
    """
    question, *answer = messages
    content = []
    for part in question["content"]:
        if part["type"] == "audio":
            waveform = processor.to_waveform(part["path"], warn=lambda message: None)
            part = {"type": "audio", "audio": waveform}
        content.append(part)
    return [{**question, "content": content}, *answer]


# ---- What is trained ----


def make_trainable(
    model: AudioFlamingo3ForConditionalGeneration, settings: Settings
) -> dict[str, nn.Parameter]:
    """Adds LoRA factors, or unfreezes all weights; returns the trained parameters by name."""
    if settings.full:
        model.float().requires_grad_(True)
    else:
        model.requires_grad_(False)
        gpus = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(gpus):  # the caller's random numbers stay as they were
            torch.manual_seed(settings.seed)
            for name in choose_layers(model, settings.targets, settings.projector):
                add_factors(model, name, settings.rank, settings.alpha)
    parameters = model.named_parameters()
    return {name: parameter for name, parameter in parameters if parameter.requires_grad}


def save_memory(model: AudioFlamingo3ForConditionalGeneration) -> None:
    """Gradient checkpointing (Chen et al. 2016): activations inside a layer are recomputed in the
    backward pass instead of kept."""
    for layer in [*model.audio_tower.layers, *model.language_model.model.layers]:
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )


class AnswerLoss(nn.Module):
    """The cross-entropy of the answers in a batch, summed over their tokens.

    Logits are computed only where an answer's token is predicted: (N, V). All of them, (B, T, V),
    would take gigabytes.

    DistributedDataParallel requires a module. This one registers only the trained parameters: the
    model is in a tuple, which hides it from nn.Module, because otherwise every process would be
    sent all frozen weights.
    """

    def __init__(self, model: AudioFlamingo3ForConditionalGeneration, trained=()):
        super().__init__()
        self.models = (model,)
        self.trained = nn.ParameterList(trained)

    def forward(self, batch: Batch) -> Tensor:
        (model,) = self.models
        inputs = {**batch}
        labels = inputs.pop("labels")[:, 1:]  # (B, T - 1): the next token of each
        inputs["attention_mask"] = inputs["attention_mask"].bool()
        is_answer = labels != -100
        x = model.prefill(**inputs)[:, :-1]  # (B, T - 1, H)
        logits = model.language_model.lm_head(x[is_answer])  # (N, V)
        return F.cross_entropy(logits.float(), labels[is_answer], reduction="sum")


# ---- Training ----


def finetune(
    model: AudioFlamingo3ForConditionalGeneration,
    processor: AudioFlamingo3Processor,
    examples: list[Example],
    output: str | Path,
    settings: Settings,
    save_every: int = 100,
    resume: bool = False,
) -> None:
    """Trains the model and writes the result to the directory `output`.

    Every `save_every` steps it prints a report and saves its state. A run that was killed can be
    resumed from there; it ends with the same weights as a run that was never killed.
    """
    check_at_least_one("save_every", save_every)
    trained_on, held_out = hold_out(examples, settings)
    batch_size = settings.batch_size * num_processes()
    check_enough(trained_on, batch_size)
    plan = plan_batches(trained_on, batch_size, settings)
    dtype = model.dtype
    trained = make_trainable(model, settings)
    optimizer = torch.optim.AdamW(trained.values(), weight_decay=0.0)
    answer_loss = AnswerLoss(model, trained.values())
    if num_processes() > 1:
        answer_loss = DistributedDataParallel(answer_loss)

    identity = {**asdict(settings), "batch_size": batch_size, "examples": digest(examples)}
    state = State(Path(output), identity, trained, optimizer)
    first_step = state.load() if resume else state.start()
    report = Report(len(plan), first_step, len(trained_on), len(held_out))
    for step in range(first_step, len(plan)):
        rate = learning_rate(step, len(plan), settings)
        part = plan[step][process_number() :: num_processes()]
        batch = make_batch(part, processor).to(model.device)
        loss = train_step(answer_loss, batch, optimizer, rate)
        check_loss(loss, step + 1)
        report.add(step + 1, loss, rate)
        is_last = step + 1 == len(plan)
        if is_first_process() and (is_last or (step + 1) % save_every == 0):
            # The adapter is saved first, so that it exists when the state says "done".
            if not settings.full:
                save_adapter(model, output, settings.model)
            elif is_last:
                model.to(dtype).save_pretrained(output)
                processor.save_pretrained(output)
            state.save(step + 1)
            report.show(model, processor, held_out, settings.batch_size)


def train_step(
    answer_loss: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer, rate: float
) -> float:
    """One step of the optimizer; returns the mean loss per token on this process."""
    num_tokens = (batch["labels"] != -100).sum()
    all_tokens = num_tokens.clone()
    if num_processes() > 1:
        dist.all_reduce(all_tokens)
    loss = answer_loss(batch)
    # Gradients of the mean loss over the tokens of all processes: DistributedDataParallel divides
    # their sum by the number of processes, so multiply by it.
    (loss * num_processes() / all_tokens).backward()
    parameters = optimizer.param_groups[0]["params"]
    nn.utils.clip_grad_norm_(parameters, max_norm=1.0)
    optimizer.param_groups[0]["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach() / num_tokens)


def learning_rate(step: int, steps: int, settings: Settings) -> float:
    """Linear warmup to the peak, then cosine decay to zero."""
    warmup_steps = max(1, round(settings.warmup * steps))
    if step < warmup_steps:
        return settings.learning_rate * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)  # from 0 to 1
    return settings.learning_rate * (1 + math.cos(math.pi * progress)) / 2


# ---- Reports ----


class Report:
    """Prints progress, in a terminal after every step, and an evaluation of held-out examples."""

    def __init__(self, steps: int, first_step: int, num_examples: int, num_held_out: int):
        self.steps = steps
        self.first_step = first_step
        self.losses = []  # since the last report
        self.line = ""
        self.progress = terminal.Progress(steps, quiet=not is_first_process())
        if is_first_process():
            line = f"{num_examples} examples, {num_held_out} held out; {steps} steps"
            if first_step > 0:
                line += f", {first_step} of them done"
            print(line, flush=True)

    def add(self, step: int, loss: float, rate: float) -> None:
        self.losses.append(loss)
        per_step = self.progress.seconds() / (step - self.first_step)
        self.line = (
            f"step {step} of {self.steps}, loss {statistics.mean(self.losses):.4f}, "
            f"learning rate {rate:.1e}, {(self.steps - step) * per_step:.0f} s left"
        )
        self.progress.write(self.line)

    def show(
        self,
        model: AudioFlamingo3ForConditionalGeneration,
        processor: AudioFlamingo3Processor,
        held_out: list[Example],
        batch_size: int,
    ) -> None:
        self.progress.clear()
        print(self.line, flush=True)
        self.losses = []
        if not held_out:
            return
        print(f"  held out: loss {held_out_loss(model, processor, held_out, batch_size):.4f}")
        for example in held_out[:SHOWN_ANSWERS]:
            response = terminal.one_line(answer(model, processor, example))
            print(f"  {response!r}, expected {example.answer!r}", flush=True)


@torch.no_grad()
def held_out_loss(model, processor, examples: list[Example], batch_size: int) -> float:
    """The mean loss per answer token of these examples."""
    total = 0.0
    num_tokens = 0
    ordered = sorted(examples, key=lambda example: example.length)
    for start in range(0, len(ordered), batch_size):
        batch = make_batch(ordered[start : start + batch_size], processor).to(model.device)
        total += float(AnswerLoss(model)(batch))
        num_tokens += int((batch["labels"] != -100).sum())
    return total / num_tokens


def answer(model, processor, example: Example) -> str:
    question = with_waveforms(example.messages[:1], processor)
    batch = processor.apply_chat_template(question, add_generation_prompt=True)
    ids = model.generate(**batch.to(model.device), max_new_tokens=64, do_sample=False)
    return processor.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)


# ---- Saving, and resuming after an interruption ----


class State:
    """What a run is resumed from: the step, the trained weights, the optimizer's moments."""

    def __init__(self, output: Path, identity: dict, trained: dict, optimizer):
        self.output = output
        self.path = output / STATE_FILE
        self.identity = json.loads(json.dumps(identity))  # with lists for tuples
        self.trained = trained
        self.optimizer = optimizer

    def start(self) -> int:
        """The first step of a new run. Refuses to overwrite the files of another run."""
        for name in (STATE_FILE, "adapter_model.safetensors", "config.json"):
            if (self.output / name).exists():
                raise ValueError(
                    f"{self.output}: {name} already exists; resume its run with --resume, "
                    "or choose another directory."
                )
        return 0

    def save(self, step: int) -> None:
        """Saves the state atomically: the earlier one is kept until this one is complete."""
        content = {
            "step": step,
            "identity": self.identity,
            "weights": {name: parameter.detach() for name, parameter in self.trained.items()},
            "optimizer": self.optimizer.state_dict(),
        }
        with new_files(self.output) as folder:
            torch.save(content, folder / STATE_FILE)

    def load(self) -> int:
        """Loads the state; returns the step to resume from: 0 if the run has not saved anything."""
        if not self.path.exists():
            return 0
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"{self.path}: not a training state ({error}).") from None
        for name, value in self.identity.items():
            if content["identity"].get(name) != value:
                raise ValueError(
                    f"{self.output}: its run has {name} {content['identity'].get(name)}, not "
                    f"{value}; --resume needs the same settings and lines."
                )
        for name, parameter in self.trained.items():
            parameter.data.copy_(content["weights"][name])
        self.optimizer.load_state_dict(content["optimizer"])
        return content["step"]


def digest(examples: list[Example]) -> str:
    """A hash that identifies a training set."""
    content = json.dumps([example.messages for example in examples])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


# ---- Checks ----


def check_settings(settings: Settings) -> None:
    for name in ("rank", "epochs", "batch_size"):
        check_at_least_one(name, getattr(settings, name))
    for name in ("alpha", "learning_rate"):
        if not 0 < getattr(settings, name) < math.inf:
            raise ValueError(f"{name} is {getattr(settings, name)}; more than 0 is expected.")
    for name in ("held_out", "warmup"):
        if not 0 <= getattr(settings, name) < 1:
            raise ValueError(f"{name} is {getattr(settings, name)}; 0 to less than 1 is expected.")
    for target in settings.targets:
        if target not in (*DECODER_LINEARS, HEAD):
            known = ", ".join((*DECODER_LINEARS, HEAD))
            raise ValueError(f"targets: {target!r} is not one of {known}.")


def check_at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} is {value}; at least 1 is expected.")


def check_loss(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise ValueError(f"The loss of step {step} is {loss}; lower --learning-rate.")


def check_can_write(directory: Path) -> None:
    """Checks before training that the result can be written after it."""
    check_can_save(directory)
    existing = directory.absolute()
    while not existing.exists():
        existing = existing.parent
    if not os.access(existing, os.W_OK) or not existing.is_dir():
        raise ValueError(f"{directory}: {existing} is not a writable directory.")


def check_enough(examples: list[Example], batch_size: int) -> None:
    if len(examples) < batch_size:
        raise ValueError(
            f"{len(examples)} examples to train on are fewer than a batch of {batch_size}; "
            "lower --batch-size, set --held-out 0 or add lines."
        )


# ---- The command line ----


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m extras.finetune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = terminal.refuse
    add = parser.add_argument
    add("lines", metavar="train.jsonl", help='JSON lines with "audio", "prompt" and "answer"')
    add("--model", required=True, help="a directory or cached hub name")
    add("--output", required=True, metavar="DIR", help="the directory to write")
    add("--resume", action="store_true", help="resume the interrupted run in DIR")
    add("--device", default="auto", help="cpu, cuda or mps (default: the best available)")
    rank_help = "the rank of the factors (default: %(default)s)"
    add("--rank", type=int, default=Settings.rank, metavar="N", help=rank_help)
    alpha_help = "scale times rank (default: %(default)s)"
    add("--alpha", type=float, default=Settings.alpha, metavar="A", help=alpha_help)
    targets_help = """the linear layers of the decoder that get factors, for example
    q_proj,v_proj; lm_head is also possible (default: all but lm_head)"""
    every_target = ",".join(DECODER_LINEARS)
    add("--targets", default=every_target, metavar="NAMES", help=targets_help)
    add("--projector", action="store_true", help="add factors to the projector's layers too")
    full_help = "train all weights, in float32; the four options above then have no effect"
    add("--full", action="store_true", help=full_help)
    epochs_help = "passes over the examples (default: %(default)s)"
    add("--epochs", type=int, default=Settings.epochs, metavar="N", help=epochs_help)
    batch_help = "examples per step, on each process (default: %(default)s)"
    add("--batch-size", type=int, default=Settings.batch_size, metavar="N", help=batch_help)
    rate_help = "the peak learning rate (default: %(default)s)"
    add("--learning-rate", type=float, default=Settings.learning_rate, metavar="R", help=rate_help)
    warmup_help = "the fraction of the steps in which the rate rises (default: %(default)s)"
    add("--warmup", type=float, default=Settings.warmup, metavar="PART", help=warmup_help)
    held_out_help = "the fraction of the lines to evaluate on, not train on (default: %(default)s)"
    add("--held-out", type=float, default=Settings.held_out, metavar="PART", help=held_out_help)
    every_help = "save and evaluate every N steps (default: %(default)s)"
    add("--save-every", type=int, default=100, metavar="N", help=every_help)
    checkpointing_help = "recompute activations in the backward pass: less memory, a third slower"
    add("--gradient-checkpointing", action="store_true", help=checkpointing_help)
    seed_help = "for the order of examples and the initial factors (default: %(default)s)"
    add("--seed", type=int, default=Settings.seed, metavar="N", help=seed_help)
    return parser


def main() -> int:
    """Returns 0, or 2 for bad input or too little memory, after one line `error: ...`."""
    terminal.prepare_streams()
    terminal.exit_on_interrupt(end_line=False)
    try:
        run(make_parser().parse_args())
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        terminal.print_error(error)
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    settings = Settings(
        model=str(args.model),
        rank=args.rank,
        alpha=args.alpha,
        targets=tuple(args.targets.split(",")),
        projector=args.projector,
        full=args.full,
        epochs=args.epochs,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        warmup=args.warmup,
        held_out=args.held_out,
        seed=args.seed,
    )
    if is_quantized(args.model):
        raise ValueError(f"{args.model} is quantized; train the model that it was made from.")
    check_can_write(Path(args.output))
    device = join_processes(args.device)
    processor = AudioFlamingo3Processor.from_pretrained(args.model)
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(args.model, device)
    if args.gradient_checkpointing:
        save_memory(model)
    limit = model.config.text_config.max_position_embeddings
    examples = read_examples(args.lines, processor, limit)
    with terminal.memory_hint("use --gradient-checkpointing or a smaller --batch-size"):
        finetune(model, processor, examples, args.output, settings, args.save_every, args.resume)
    if dist.is_initialized():
        dist.barrier()  # the first process may still be writing when the others are done
        dist.destroy_process_group()


def join_processes(device: str) -> str:
    """Joins the processes that torchrun has started; returns the device of this one."""
    if num_processes() == 1:
        return device
    if device == "auto" and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return device


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # sys.exit sometimes aborts in threads that gloo has left running
