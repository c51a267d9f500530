"""Several processes, started by torchrun: they divide the recordings, or split the model.

    torchrun --nproc-per-node 2 generate.py recordings/ "What is this?" --output answers.jsonl
    torchrun --nproc-per-node 2 generate.py a.wav "What is this?" --tensor-parallel

Only the first process prints. Processes communicate through torch.distributed: with NCCL for
tensors on GPUs, with gloo for everything else.
"""

import os
import signal
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from fnmatch import fnmatch
from queue import SimpleQueue
from threading import Thread

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from af3 import AudioFlamingo3ForConditionalGeneration
from extras.many_recordings import Job
from plumbing import terminal
from plumbing.positional_arguments import STDIN
from plumbing.terminal import refuse

CPU = torch.device("cpu")

# ---- Processes ----


@contextmanager
def joined_processes() -> Iterator[None]:
    """Within the context, processes can communicate. At its end each waits for the others."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # No timeout is needed: gloo notices at once when another process dies.
    dist.init_process_group(backend, timeout=timedelta(days=365))
    if dist.get_rank() == 0:
        # torchrun sends SIGTERM to the others when one has died; the first must still report it.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")
    # Even without --seed, processes that split a model must sample the same tokens.
    torch.manual_seed(from_first_process(torch.initial_seed()))
    yield
    with suppress(RuntimeError):  # another process has exited early; everything is printed
        dist.barrier()


def from_first_process(value):
    """Broadcasts the value of the first process."""
    values = [value]
    dist.broadcast_object_list(values, src=0, device=CPU)
    return values[0]


def own_device(device: str) -> str:
    """The device of this process: if there are GPUs, each process has its own."""
    if device not in ("auto", "cuda") or not torch.cuda.is_available():
        return device
    processes = int(os.environ["LOCAL_WORLD_SIZE"])
    if processes > torch.cuda.device_count():
        raise ValueError(
            f"{processes} processes need as many GPUs, and there are {torch.cuda.device_count()}; "
            "start fewer, or use --device cpu."
        )
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return f"cuda:{os.environ['LOCAL_RANK']}"


# ---- Sharing the recordings ----


def share_jobs(
    jobs: list[Job], answer: Callable[[list[Job]], Iterator[Job]], progress: terminal.Progress
) -> Iterator[Job]:
    """On the first process, yields all jobs with outcomes, in the order given; on others, none.

    With N processes, process r answers the jobs r, r + N, r + 2 N and so on: `answer` loads the
    model and yields the jobs of a share with their outcomes. The first process answers its share
    in a thread, so that meanwhile it can print the answers of the others.
    Raises RuntimeError with the reason if a process cannot continue, and ConnectionError with the
    number of a process that has died.
    """
    rank = dist.get_rank()
    torch.manual_seed((torch.initial_seed() + rank) % 2**64)  # each samples differently
    if rank > 0:
        answer_share(jobs, answer, send_to_first_process)
        return
    messages = SimpleQueue()
    start_thread(answer_share, jobs, answer, messages.put)
    for other in range(1, dist.get_world_size()):
        start_thread(receive, other, messages.put)
    outcomes = {}
    received = 0
    for number in range(len(jobs)):
        while number not in outcomes:
            message = messages.get()
            if isinstance(message, Warning):
                terminal.print_warning(message)
            elif isinstance(message, Exception):
                raise message
            else:
                outcomes.update(message)
                received += 1
                progress.show(received)
        progress.clear()
        yield outcomes.pop(number)


def answer_share(jobs: list[Job], answer: Callable, send: Callable) -> None:
    """Sends each job of this process's share as soon as it is done: {its number: job}.

    Also sends warnings about recordings, and an exception if this process cannot continue.
    """
    numbers = range(dist.get_rank(), len(jobs), dist.get_world_size())
    try:
        share = answer([jobs[number] for number in numbers]) if numbers else []
        if dist.get_rank() > 0:  # not before: the first process prints loading's warnings
            warnings.showwarning = lambda warning, *_: send(warning)
        for number, job in zip(numbers, share):
            send({number: job})
    except Exception as error:
        send(RuntimeError(terminal.describe_error(error)))


def send_to_first_process(message) -> None:
    try:
        dist.send_object_list([message], dst=0, device=CPU)
    except RuntimeError:  # it has exited, so no more answers are needed
        os._exit(0)


def receive(rank: int, put: Callable) -> None:
    """Forwards the messages of a process until it ends."""
    messages = [None]
    try:
        while True:
            dist.recv_object_list(messages, src=rank, device=CPU)
            put(messages[0])
    except RuntimeError:
        remedy = "run the same command again; with --output, it resumes where this run ended"
        put(ConnectionError(f"process {rank} has died; {remedy}"))


def start_thread(function: Callable, *arguments) -> None:
    Thread(target=function, args=arguments, daemon=True).start()


# ---- Splitting the model ----

# q, k, v, gate and up keep some of their output channels: rows of the weight (out, in), or columns
# of the transposed weight, hence PyTorch's "column-wise". o and down keep the matching input
# channels, and their outputs are summed over the processes.
PLAN = {
    "model.layers.*.self_attn.q_proj": ColwiseParallel(),
    "model.layers.*.self_attn.k_proj": ColwiseParallel(),
    "model.layers.*.self_attn.v_proj": ColwiseParallel(),
    "model.layers.*.self_attn.o_proj": RowwiseParallel(),
    "model.layers.*.mlp.gate_proj": ColwiseParallel(),
    "model.layers.*.mlp.up_proj": ColwiseParallel(),
    "model.layers.*.mlp.down_proj": RowwiseParallel(),
    "lm_head": ColwiseParallel(output_layouts=Replicate()),  # every process has all logits
}


def split_model(
    model: AudioFlamingo3ForConditionalGeneration, device: str | torch.device = "cpu"
) -> AudioFlamingo3ForConditionalGeneration:
    """Keeps only this process's part of the decoder and lm_head, on a device; returns the model.

    If weights are memory-mapped, only this part is read.
    """
    processes = dist.get_world_size()
    config = model.config.text_config
    check_divisible("num_key_value_heads", config.num_key_value_heads, processes)
    check_divisible("intermediate_size", config.intermediate_size, processes)
    mesh = init_device_mesh(torch.device(device).type, (processes,))
    for name, linear in model.language_model.named_modules():
        for pattern, style in PLAN.items():
            if fnmatch(name, pattern):
                keep_part(linear, mesh, dim=1 if isinstance(style, RowwiseParallel) else 0)
    parallelize_module(model.language_model, mesh, PLAN)
    # A cache made with this configuration has only the heads of this process.
    own_heads = config.num_key_value_heads // processes
    model.config = replace(model.config, text_config=replace(config, num_key_value_heads=own_heads))
    model.stream = reporting_death(model.stream)
    return model


def keep_part(linear: nn.Linear, mesh: DeviceMesh, dim: int) -> None:
    """Keeps only this process's part of a weight (out, in): some rows (dim 0) or columns (1).

    `parallelize_module` accepts such a part; it would send whole weights from the first process.
    """
    for name, whole in list(linear.named_parameters()):
        part = whole.chunk(mesh.size(), dim)[mesh.get_rank()].contiguous()
        part = part.to(mesh.device_type)
        tensor = DTensor.from_local(
            part,
            mesh,
            [Shard(dim)],
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )
        setattr(linear, name, nn.Parameter(tensor, requires_grad=False))


def reporting_death(stream: Callable) -> Callable:
    """Makes `stream` raise ConnectionError, which ends the program, if another process dies."""

    def steps(*arguments, **options) -> Iterator[Tensor]:
        try:
            yield from stream(*arguments, **options)
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            raise ConnectionError(
                "another process has died or cannot be reached; run the same command again "
                f"({error})"
            ) from None

    return steps


# ---- Checks ----


def check_options(args: Namespace, is_for_many: bool) -> None:
    """Refuses options that several processes do not support."""
    if not dist.is_initialized():
        refuse("--tensor-parallel needs several processes: torchrun --nproc-per-node 2 generate.py")
    for name in ("chat", "explain", "save"):
        if getattr(args, name) not in (None, False):
            refuse(f"--{name} is for one process; start it with python, not with torchrun")
    if not args.tensor_parallel:
        if not is_for_many:
            refuse("one recording is for one process; --tensor-parallel splits the model instead")
        return
    if args.timestamps:
        refuse("--timestamps needs all heads; with --tensor-parallel a process has only some")
    if args.choose:
        refuse("--choose is for processes that share recordings, without --tensor-parallel")
    if args.int8 or args.int4:
        refuse("--tensor-parallel does not support --int8 and --int4")
    if args.think or args.adapter:
        refuse("--tensor-parallel does not support adapters; --save the merged model first")
    if STDIN in args.words:
        refuse("--tensor-parallel reads a recording in each process; give a file, not -")


def check_divisible(name: str, size: int, processes: int) -> None:
    if size % processes:
        raise ValueError(
            f"--tensor-parallel divides {name}, which is {size} in this model, by the number of "
            f"processes, which is {processes}; choose a number that divides it."
        )
