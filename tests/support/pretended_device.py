"""A second device that is not there: an operation that mixes it with the CPU fails, as on a GPU.

Its tensors are CPU tensors of another class, so the results are those of the CPU. Only `to`, `cpu`
and `copy_` lead from one to the other; a tensor without dimensions may be on the CPU, as for a GPU.
"""

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("xla", 0)  # a name that PyTorch knows without such a device
CPU = torch.device("cpu")


class Pretended(Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


class PretendedDevice(TorchFunctionMode):
    """Inside, tensors can be made on DEVICE and moved to it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


def compute(function, args, kwargs):
    """The function's result, on the device of its arguments or on the one that is asked for."""
    leaves = tree_leaves((args, kwargs))
    is_here = any(isinstance(leaf, Pretended) for leaf in leaves)
    if is_here and function == Tensor.device.__get__:
        return DEVICE
    if is_here:
        check(function, leaves)
    asked = [CPU if leaf == "cpu" else leaf for leaf in leaves if not isinstance(leaf, Tensor)]
    to_cpu = function is Tensor.cpu or CPU in asked
    with torch._C.DisableTorchFunctionSubclass():
        result = function(*tree_map(as_plain, args), **tree_map(as_plain, kwargs))
        if DEVICE in asked or (is_here and not to_cpu):
            return tree_map(as_pretended, result)
        return result


def check(function, leaves):
    """Raises RuntimeError for what a GPU would refuse."""
    name = getattr(function, "__name__", str(function))
    if function in (Tensor.numpy, Tensor.__array__):
        raise RuntimeError(f"{name} needs a tensor on the CPU")
    if function in (Tensor.to, Tensor.cpu, Tensor.copy_):
        return
    for leaf in leaves:
        if isinstance(leaf, Tensor) and not isinstance(leaf, Pretended) and leaf.ndim > 0:
            raise RuntimeError(f"{name} mixes devices: a tensor {tuple(leaf.shape)} is on the CPU")


def as_plain(value):
    if isinstance(value, Pretended):
        return value.as_subclass(Tensor)
    return CPU if isinstance(value, torch.device) and value == DEVICE else value


def as_pretended(value):
    return value.as_subclass(Pretended) if isinstance(value, Tensor) else value


def pretend(model: nn.Module) -> nn.Module:
    """Moves a model to DEVICE, for inference; returns it."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = as_pretended(tensor.detach())
    return model
