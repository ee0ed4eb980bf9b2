"""Tensors that lie in shards on several processes (FSDP2's DTensor): read whole, written in place.

All processes call these functions at the same places, with the same arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """All of `tensor`, on every process; itself where it is not sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether any parameter lies in shards."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def set_slices(tensor: Tensor, dimension: int, index: Tensor, values: Tensor | float) -> None:
    """Set the slices `index` (k) of `tensor` along `dimension` to `values`, in place.

    `values` is a number, or the k slices with `dimension` in its place.
    """
    if not isinstance(tensor, DTensor):
        _set(tensor, dimension, index, values)
        return
    mask = torch.zeros(tensor.shape, dtype=torch.bool, device=index.device)
    new = torch.zeros(tensor.shape, dtype=tensor.dtype, device=index.device)
    _set(mask, dimension, index, 1.0)
    _set(new, dimension, index, values)
    local = tensor.to_local()
    local.copy_(torch.where(_own(mask, tensor), _own(new, tensor), local))


def _set(tensor: Tensor, dimension: int, index: Tensor, values: Tensor | float) -> None:
    if isinstance(values, Tensor):
        tensor.index_copy_(dimension, index, values.to(tensor))
    else:
        tensor.index_fill_(dimension, index, values)


def _own(tensor: Tensor, like: DTensor) -> Tensor:
    """This process's shard of a whole tensor that all have."""
    return distribute_tensor(
        tensor, like.device_mesh, like.placements, src_data_rank=None
    ).to_local()
