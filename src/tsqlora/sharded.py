"""Tensors that lie in shards on several processes: read whole, written in place.

FSDP2 shards everything (DTensor); DeepSpeed's ZeRO all but the parameters (`zero.py`).

All processes call these functions at the same places, with the same arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from tsqlora import zero
from tsqlora.zero import Piece


def whole(tensor: Tensor) -> Tensor:
    """All of `tensor`, on every process; itself where it is not sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether any parameter lies in shards."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def has_gradient(parameter: Tensor) -> bool:
    """Whether a backward has left one."""
    if zero.in_pieces(parameter):
        return zero.has_gradient(parameter)
    return parameter.grad is not None


def whole_gradient(parameter: Tensor) -> Tensor | None:
    """All of a parameter's gradient, on every process."""
    if zero.in_pieces(parameter):
        return zero.whole_gradient(parameter)
    return None if parameter.grad is None else whole(parameter.grad)


def zero_gradient(parameter: Tensor, dimension: int, index: Tensor) -> None:
    """Zero the slices `index` of a parameter's gradient along `dimension`."""
    if zero.in_pieces(parameter) and zero.has_gradient(parameter):
        gradient = zero.whole_gradient(parameter)
        zero.set_gradient(parameter, gradient.index_fill(dimension, index, 0.0))
    elif parameter.grad is not None:
        set_slices(parameter.grad, dimension, index, 0.0)


def set_parameter(parameter: Tensor, dimension: int, index: Tensor, values: Tensor | float) -> None:
    """`set_slices` of a parameter, and of the copy that the optimizer steps on."""
    set_slices(parameter, dimension, index, values)
    copy = zero.fp32_copy(parameter) if zero.in_pieces(parameter) else None
    if copy is not None:
        set_slices(copy, dimension, index, values)


def set_slices(
    tensor: Tensor | Piece, dimension: int, index: Tensor, values: Tensor | float
) -> None:
    """Set the slices `index` (k) of `tensor` along `dimension` to `values`, in place.

    `values` is a number, or the k slices with `dimension` in its place.
    """
    if not isinstance(tensor, (DTensor, Piece)):
        _set(tensor, dimension, index, values)
        return
    mask = torch.zeros(tensor.shape, dtype=torch.bool, device=index.device)
    local = tensor.local if isinstance(tensor, Piece) else tensor.to_local()
    new = torch.zeros(tensor.shape, dtype=local.dtype, device=index.device)
    _set(mask, dimension, index, 1.0)
    _set(new, dimension, index, values)
    local.copy_(torch.where(_own(mask, tensor), _own(new, tensor), local))


def _set(tensor: Tensor, dimension: int, index: Tensor, values: Tensor | float) -> None:
    if isinstance(values, Tensor):
        tensor.index_copy_(dimension, index, values.to(tensor))
    else:
        tensor.index_fill_(dimension, index, values)


def _own(tensor: Tensor, like: DTensor | Piece) -> Tensor:
    """This process's shard of a whole tensor that all have."""
    if isinstance(like, Piece):
        return tensor.flatten().narrow(0, like.start, len(like.local)).to(like.local.device)
    return distribute_tensor(
        tensor, like.device_mesh, like.placements, src_data_rank=None
    ).to_local()
