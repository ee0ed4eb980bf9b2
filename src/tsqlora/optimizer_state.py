"""What an optimizer remembers of single components: rows of A, columns of B.

Understood are tensors of the parameter's own shape (moments, momentum, sums; in 8 bits as
bitsandbytes keeps them) and the two factors of Adafactor's second moment, one number a row and one
a column; not the second copy of the weights that schedule-free ones keep, which would draw a grown
row back. A component's part is then a slice, and where that slice, the parameter's and the
gradient's are all zero, every step leaves them zero: update 0 / (√0 + ε), decay λ · 0.

Of Adafactor's factors R (rows) and C (columns), with E g² ≈ R C / mean(R), the one that runs along
the components has such a slice. The other is a mean over them all, so it is scaled with what is
taken out, and the estimates for the components that stay do not change. In 8 bits 0 does not stay 0
when it is quantised again (bitsandbytes 0.50 on a CPU): there slices are zeroed before each step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tsqlora.errors import TrainingError
from tsqlora.lora_layers import LoraModule
from tsqlora.sharded import set_slices, whole
from tsqlora.zero import Piece, in_pieces, pieces_of_state

_ROWS = {"row_var": "col_var", "exp_avg_sq_row": "exp_avg_sq_col"}
_COLUMNS = {column: row for row, column in _ROWS.items()}
_OTHER = {**_ROWS, **_COLUMNS}
_COPIES = {"z"}
_QUANTISED = {"state1": "qmap1", "state2": "qmap2"}
_QUANTISING = ("qmap1", "qmap2", "absmax1", "absmax2", "new_max1", "new_max2")


def state_of(optimizer: Optimizer | None, parameter: nn.Parameter) -> dict[str, Any]:
    """The optimizer's state of one parameter; empty before its first step."""
    if optimizer is None:
        return {}
    inner = _unwrapped(optimizer)
    if in_pieces(parameter):
        return pieces_of_state(inner, parameter)
    found: dict[str, Any] = inner.state.get(parameter, {})
    return found


def _unwrapped(optimizer: Any) -> Any:
    """torch's within accelerate's wrapper and DeepSpeed's ZeRO."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def check_trains(modules: Sequence[LoraModule], optimizer: Optimizer) -> None:
    """Check that the optimizer was made over the factors.

    Raises:
        TrainingError: naming one that it does not train.
    """
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [
        m.name
        for m in modules
        if not all(id(f.weight) in trained or in_pieces(f.weight) for f in (m.a, m.b))
    ]
    if missing:
        raise TrainingError(
            f"The optimizer does not train the LoRA factors of {missing[0]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            + ": make the optimizer after get_peft_model, over the trainable parameters."
        )


def check_understood(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> bool:
    """Whether there is state yet; that of every parameter is one we know how to slice.

    Raises:
        TrainingError: it is not.
    """
    states = [(parameter, state_of(optimizer, parameter)) for parameter in parameters]
    for parameter, state in states:
        for dimension in (0, 1):
            _slices(optimizer, parameter, dimension, state)
    return any(state for _, state in states)


def is_quantised(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> bool:
    """Whether any state lies in 8 bits, so that what is 0 may drift."""
    states = (state_of(optimizer, parameter) for parameter in parameters)
    return any(key in state and _quantised(state[key]) for state in states for key in _QUANTISED)


def zero_state(
    optimizer: Optimizer | None, parameter: nn.Parameter, dimension: int, index: Tensor
) -> None:
    """Forget what is known of the slices `index` of `parameter` along `dimension`."""
    state = state_of(optimizer, parameter)
    for key, along in _slices(optimizer, parameter, dimension, state).items():
        value = state[key]
        before = whole(value).sum() if key in _OTHER else None
        set_slices(value, along, index, _zero_code(state, key) if _quantised(value) else 0)
        if before is not None:
            share = torch.where(before > 0, whole(value).sum() / before, 1)
            state[_OTHER[key]].mul_(float(share))


def keep_state(
    optimizer: Optimizer | None, parameter: nn.Parameter, dimension: int, index: Tensor
) -> dict[str, Tensor]:
    """The state of the slices `index` alone; what does not change with them is left out.

    Raises:
        TrainingError: it lies in 8 bits, in blocks that go across slices.
    """
    state = state_of(optimizer, parameter)
    along = _slices(optimizer, parameter, dimension, state)
    if any(_quantised(state[key]) for key in along):
        raise TrainingError(
            "The optimizer's 8-bit state cannot be cut to fewer ranks: leave out ranks.compact, or "
            "use an optimizer that keeps 32 bits, such as adamw_torch."
        )
    kept = {key: state[key].index_select(dim, index) for key, dim in along.items()}
    share = parameter.shape[dimension] / len(index)  # a mean over fewer, of those that are not 0
    return kept | {_OTHER[key]: state[_OTHER[key]] * share for key in along if key in _OTHER}


def _slices(
    optimizer: Optimizer | None, parameter: nn.Parameter, dimension: int, state: dict[str, Any]
) -> dict[str, int]:
    """By key, the dimension of the state's tensor that runs along the parameter's `dimension`."""
    found = {}
    rows, columns = parameter.shape
    for key, value in state.items():
        plain = type(value) in (Tensor, nn.Parameter, Piece) or type(value).__name__ == "DTensor"
        shape = tuple(value.shape) if plain else None
        if shape == (rows, columns) and key not in _OTHER and key not in _COPIES:
            if _quantised(value) and _QUANTISED.get(key) not in state:
                raise _not_understood(optimizer, key, value)
            found[key] = dimension
        elif key in _ROWS and shape in ((rows,), (rows, 1)):
            found |= {key: 0} if dimension == 0 else {}
        elif key in _COLUMNS and shape in ((columns,), (1, columns)):
            found |= {key: len(shape) - 1} if dimension == 1 else {}
        elif not _is_scalar(value) and not (key in _QUANTISING and "state1" in state):
            raise _not_understood(optimizer, key, value)
    return found


def _is_scalar(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1
    return value is None or isinstance(value, (bool, int, float, str))


def _quantised(value: Tensor | Piece) -> bool:
    return not value.is_floating_point()


def _zero_code(state: dict[str, Any], key: str) -> int:
    """The code that stands for exactly 0."""
    codes = (state[_QUANTISED[key]] == 0).nonzero().flatten()
    if not len(codes):
        raise TrainingError(
            f"The optimizer's 8-bit {key} has no code for 0; use another optimizer."
        )
    return int(codes[0])


def _not_understood(optimizer: Optimizer | None, key: str, value: Any) -> TrainingError:
    name = type(_unwrapped(optimizer)).__name__
    what = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    return TrainingError(
        f"{name} keeps {key!r} ({what}) for a LoRA factor, and dynamic ranks do not know what part "
        "of it belongs to which component. Use AdamW, SGD or Adafactor, or ranks.dynamic: false."
    )
