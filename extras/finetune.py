"""Teaches the model a task from examples, by LoRA or as a whole, with PyTorch alone.

    python -m extras.finetune train.jsonl --model MODEL --output DIR
    python -m extras.finetune train.jsonl --model MODEL --output DIR --resume
    torchrun --nproc-per-node 2 -m extras.finetune train.jsonl --model MODEL --output DIR

Each line of train.jsonl is such as {"audio": "a.wav", "prompt": "Who speaks?", "answer": "theo"}.
The loss is the cross-entropy of the answer's tokens and of the end of the turn. Nothing else is
learned: a model that also learns to predict its prompts forgets what it was asked for.

By LoRA the weights stay as they are, and two thin matrices beside each are trained (lora.py).
DIR then holds an adapter as `peft` saves it: for `generate.py --adapter DIR` here, and for
transformers. With --full everything is trained, and DIR holds a whole checkpoint.

From Python: `finetune(model, processor, examples, "DIR", Settings(epochs=1))`.
Letters in shapes: B rows of a batch, T tokens, H hidden size, N tokens of all answers.
"""

import argparse
import hashlib
import json
import math
import os
import random
import statistics
import sys
import warnings
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from af3 import AudioFlamingo3ForConditionalGeneration, check_length
from extras.lora import DECODER_LINEARS, HEAD, add_factors, choose_layers, save_adapter
from extras.many_recordings import (
    OWN_FIELDS,
    check_no_faults,
    load_one,
    new_job,
    read_entries,
    warn_about_missing_prompts,
    with_choices,
)
from load_weights import is_quantized
from plumbing import terminal
from plumbing.processes import is_first_process, num_processes, process_number
from plumbing.save_checkpoint import check_can_save, new_files
from processor import AudioFlamingo3Processor, Batch

STATE_FILE = "training_state.pt"
SHOWN_ANSWERS = 4  # held-out answers that a report prints


@dataclass
class Settings:
    """What decides how the weights come out. A run can be resumed only with the same."""

    model: str | None = None  # the name of the checkpoint, written into the adapter
    rank: int = 16  # rows of A, columns of B
    alpha: float = 32.0  # scale = alpha / rank
    targets: tuple[str, ...] = DECODER_LINEARS  # linear layers of the decoder that get factors
    projector: bool = False  # whether the projector's two layers get factors too
    full: bool = False  # train all weights instead
    epochs: int = 3
    batch_size: int = 8  # examples in a step, on each process
    learning_rate: float = 2e-4  # the highest
    warmup: float = 0.05  # the part of all steps in which the learning rate rises
    held_out: float = 0.05  # the part of the examples that is not trained on
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
    """The examples in a file of JSON lines or a JSON array. Every recording is read once.

    Raises ValueError, which names bad lines by their numbers; max_tokens is the model's limit.
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
            faults.append(fault if place in fault else f"{place}: {fault}")
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
        num_frames += processor.count_audio_frames(load_one(file, processor))
        content.append({"type": "audio", "path": file})
    content.append({"type": "text", "text": with_choices(job.prompt, job.choices)})
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    text = processor.apply_chat_template(messages, tokenize=False)  # a <sound> for each recording
    ids = processor.tokenizer.encode_pieces(processor.tokenizer.split_added_tokens(text))
    length = len(ids) - len(job.recordings) + num_frames
    check_length(length, 0, max_tokens)
    return Example(messages, answer, length)


def hold_out(examples: list[Example], settings: Settings) -> tuple[list[Example], list[Example]]:
    """The examples to train on, and those of which only loss and answers are looked at."""
    count = math.ceil(settings.held_out * len(examples))
    shuffled = random.Random(settings.seed).sample(examples, len(examples))
    return shuffled[count:], shuffled[:count]


def plan_batches(
    examples: list[Example], batch_size: int, settings: Settings
) -> list[list[Example]]:
    """The batch of each step of the training, known before it begins: so it can be resumed.

    An epoch takes the examples in random order, 16 batches at a time, and sorts these by length,
    so that little is padded. Examples that fill no batch are left out of the epoch.
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
    chats = [example.messages for example in examples]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `read_examples` has shown what is odd about a recording
        return processor.apply_chat_template(chats, output_labels="answer")


# ---- What is trained ----


def make_trainable(
    model: AudioFlamingo3ForConditionalGeneration, settings: Settings
) -> dict[str, nn.Parameter]:
    """Gives the model its factors, or frees all weights; returns what is trained, by name."""
    torch.manual_seed(settings.seed)
    if settings.full:
        model.float().requires_grad_(True)
    else:
        for name in choose_layers(model, settings.targets, settings.projector):
            add_factors(model, name, settings.rank, settings.alpha)
    parameters = model.named_parameters()
    return {name: parameter for name, parameter in parameters if parameter.requires_grad}


def save_memory(model: AudioFlamingo3ForConditionalGeneration) -> None:
    """Gradient checkpointing (Chen et al. 2016): what is inside a layer is computed again when
    its gradient is, and not kept until then."""
    for layer in [*model.audio_tower.layers, *model.language_model.model.layers]:
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )


class AnswerLoss(nn.Module):
    """The cross-entropy of the answers in a batch, summed over their tokens.

    The logits are computed where an answer's token is predicted only: (N, V). All of them,
    (B, T, V), would take gigabytes.
    A module of its own, because DistributedDataParallel wants one. Its parameters are those that
    are trained. The model is in a tuple, where nn.Module does not look for more of them: else
    every process would be sent all frozen weights.
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

    Every `save_every` steps it prints a report and writes the state from which a run that was
    killed is resumed. A resumed run ends with the weights of one that was never killed.
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
            # The state comes after the adapter: a state that says "done" has one beside it.
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
    """One step of the optimizer; returns the mean loss of a token on this process."""
    num_tokens = (batch["labels"] != -100).sum()
    all_tokens = num_tokens.clone()
    if num_processes() > 1:
        dist.all_reduce(all_tokens)
    loss = answer_loss(batch)
    # Gradients are those of the mean over the tokens of all processes.
    # DistributedDataParallel divides their sum by the number of processes; this undoes it.
    (loss * num_processes() / all_tokens).backward()
    parameters = optimizer.param_groups[0]["params"]
    nn.utils.clip_grad_norm_(parameters, max_norm=1.0)
    optimizer.param_groups[0]["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach() / num_tokens)


def learning_rate(step: int, steps: int, settings: Settings) -> float:
    """Rises in a straight line to the highest, then falls along half a cosine to zero."""
    warmup_steps = max(1, round(settings.warmup * steps))
    if step < warmup_steps:
        return settings.learning_rate * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)  # from 0 to 1
    return settings.learning_rate * (1 + math.cos(math.pi * progress)) / 2


# ---- Reports ----


class Report:
    """A line of progress, in a terminal after every step, and what the held-out examples give."""

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
            print(f"  {response!r}, where {example.answer!r} is right", flush=True)


@torch.no_grad()
def held_out_loss(model, processor, examples: list[Example], batch_size: int) -> float:
    """The mean loss of a token in the answers of these examples."""
    total = 0.0
    num_tokens = 0
    ordered = sorted(examples, key=lambda example: example.length)
    for start in range(0, len(ordered), batch_size):
        batch = make_batch(ordered[start : start + batch_size], processor).to(model.device)
        total += float(AnswerLoss(model)(batch))
        num_tokens += int((batch["labels"] != -100).sum())
    return total / num_tokens


def answer(model, processor, example: Example) -> str:
    question = example.messages[:1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = processor.apply_chat_template(question, add_generation_prompt=True)
    ids = model.generate(**batch.to(model.device), max_new_tokens=64)
    return processor.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)


# ---- Saving, and going on after an interruption ----


class State:
    """All that decides how a run goes on: the step, what is trained, the optimizer's moments."""

    def __init__(self, output: Path, identity: dict, trained: dict, optimizer):
        self.output = output
        self.path = output / STATE_FILE
        self.identity = json.loads(json.dumps(identity))  # tuples as lists, as they come back
        self.trained = trained
        self.optimizer = optimizer

    def start(self) -> int:
        """The first step of a new run. Refuses to replace what another has written."""
        for name in (STATE_FILE, "adapter_model.safetensors", "config.json"):
            if (self.output / name).exists():
                raise ValueError(
                    f"{self.output}: {name} is there already; --resume goes on with a run, "
                    "or choose another directory."
                )
        return 0

    def save(self, step: int) -> None:
        """Replaces the file as a whole, so that one of an earlier step is there until then."""
        content = {
            "step": step,
            "identity": self.identity,
            "weights": {name: parameter.detach() for name, parameter in self.trained.items()},
            "optimizer": self.optimizer.state_dict(),
        }
        with new_files(self.output) as folder:
            torch.save(content, folder / STATE_FILE)

    def load(self) -> int:
        """The step to go on with: 0 if the run was killed before it saved anything."""
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
                    f"{value}; --resume goes on with the same settings and lines only."
                )
        for name, parameter in self.trained.items():
            parameter.data.copy_(content["weights"][name])
        self.optimizer.load_state_dict(content["optimizer"])
        return content["step"]


def digest(examples: list[Example]) -> str:
    """Tells one training set from another."""
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
            raise ValueError(f"targets: {target!r} is none of {known}.")


def check_at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} is {value}; at least 1 is expected.")


def check_loss(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise ValueError(f"The loss of step {step} is {loss}; lower --learning-rate.")


def check_can_write(directory: Path) -> None:
    """Refuses now what would fail after the training."""
    check_can_save(directory)
    existing = directory.absolute()
    while not existing.exists():
        existing = existing.parent
    if not os.access(existing, os.W_OK) or not existing.is_dir():
        raise ValueError(f"{directory}: {existing} is no directory that can be written to.")


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
    add("--output", required=True, metavar="DIR", help="where the adapter, or all, is written")
    add("--resume", action="store_true", help="go on with the run in DIR that was interrupted")
    add("--device", default="auto", help="cpu, cuda or mps (default: the best available)")
    rank_help = "the rank of the factors (default: %(default)s)"
    add("--rank", type=int, default=Settings.rank, metavar="N", help=rank_help)
    alpha_help = "scale times rank (default: %(default)s)"
    add("--alpha", type=float, default=Settings.alpha, metavar="A", help=alpha_help)
    targets_help = """the linear layers of the decoder that get factors, such as q_proj,v_proj;
    lm_head may be one (default: all but lm_head)"""
    every_target = ",".join(DECODER_LINEARS)
    add("--targets", default=every_target, metavar="NAMES", help=targets_help)
    add("--projector", action="store_true", help="the projector's layers get factors too")
    full_help = "train all weights, in float32; the four options before this have no effect then"
    add("--full", action="store_true", help=full_help)
    epochs_help = "how often each example is trained on (default: %(default)s)"
    add("--epochs", type=int, default=Settings.epochs, metavar="N", help=epochs_help)
    batch_help = "examples in a step, on each process (default: %(default)s)"
    add("--batch-size", type=int, default=Settings.batch_size, metavar="N", help=batch_help)
    rate_help = "the highest (default: %(default)s)"
    add("--learning-rate", type=float, default=Settings.learning_rate, metavar="R", help=rate_help)
    warmup_help = "the part of the steps in which the rate rises (default: %(default)s)"
    add("--warmup", type=float, default=Settings.warmup, metavar="PART", help=warmup_help)
    held_out_help = "the part of the lines that is only looked at (default: %(default)s)"
    add("--held-out", type=float, default=Settings.held_out, metavar="PART", help=held_out_help)
    every_help = "save, and look at what is held out, every N steps (default: %(default)s)"
    add("--save-every", type=int, default=100, metavar="N", help=every_help)
    checkpointing_help = "compute layers again for their gradients: less memory, a third slower"
    add("--gradient-checkpointing", action="store_true", help=checkpointing_help)
    seed_help = "of the order of examples and the first factors (default: %(default)s)"
    add("--seed", type=int, default=Settings.seed, metavar="N", help=seed_help)
    return parser


def main() -> int:
    """The exit status: 0, or 2 for bad input or too little memory, with one line `error: ...`."""
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
        raise ValueError(f"{args.model} is quantized; train the model that it was made of.")
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
        dist.barrier()  # the first process still writes when the others are done
        dist.destroy_process_group()


def join_processes(device: str) -> str:
    """Joins the other processes that torchrun has started; returns the device of this one."""
    if num_processes() == 1:
        return device
    if device == "auto" and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return device


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # sys.exit sometimes aborts in the threads that gloo has left
