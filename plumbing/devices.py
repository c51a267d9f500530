"""The device and dtype of a model, and building one without memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DIVIDED = ("balanced", "balanced_low_0", "sequential")  # names in transformers


def choose_device(device_map: str | int | torch.device | dict | None) -> str | torch.device:
    """The device that a `device_map` of transformers means, if PyTorch can use it.

    "auto" (CUDA, else MPS, else CPU), a torch.device or its name, the number of a CUDA device, None
    (the CPU), or {"": one of these}. Raises ValueError.
    """
    if isinstance(device_map, dict) and list(device_map) == [""]:
        device_map = device_map[""]
    if isinstance(device_map, dict) or device_map in DIVIDED:
        raise ValueError(
            "device_map divides the model among devices, which is not supported; "
            "auto, or the name of one device, is expected."
        )
    if device_map is None:
        return "cpu"
    if type(device_map) is int:
        device_map = f"cuda:{device_map}"
    if device_map != "auto":
        check_device(device_map)
        return device_map
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def check_device(device: str | torch.device) -> None:
    try:
        usable = torch.device(device).type in ("cpu", "cuda", "mps")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError):
        usable = False
    if not usable:
        raise ValueError(
            f"device is {str(device)!r}, which PyTorch cannot use here; "
            "auto, cpu, cuda or mps is expected, and auto is always right."
        )


def choose_dtype(dtype: str | torch.dtype, own_dtype: torch.dtype) -> torch.dtype:
    """The dtype that "auto" (own_dtype), a torch.dtype or its name means."""
    if dtype == "auto":
        return own_dtype
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; auto, float32, bfloat16 or float16 is expected.")
    return DTYPES[name]


class SkipRandomStart(TorchFunctionMode):
    """Inside, the functions of torch.nn.init leave a tensor as it is."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = options or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return options["tensor"] if "tensor" in options else arguments[0]
        return function(*arguments, **options)


@contextmanager
def shapes_without_memory() -> Iterator[None]:
    """Inside, modules are built on the "meta" device: their tensors have shapes, but no values.

    Without a random start: for an nn.Embedding on that device, PyTorch would import its compiler,
    which takes a second.
    """
    with torch.device("meta"), SkipRandomStart():
        yield
