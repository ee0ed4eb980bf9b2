"""The second forward of a batch, begun where it first differs from the one before."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


class Replay:
    """Remembers what leaves the modules that ran before any of `watched` did, and gives it again.

    Exact where the model is a function of its inputs and only `watched` modules have changed since:
    all that ran before them would give the same again. If the model has changed any of it in place,
    nothing is given again, and the whole forward runs. The modules remembered are the largest that
    hold none of `watched`, a whole layer each, mostly; what runs inside one of them is left out, as
    it will not run again (layers may share an activation or a norm).
    """

    def __init__(self, model: nn.Module, watched: Iterable[nn.Module]) -> None:
        self._watched = list(watched)
        ids = {id(module) for module in self._watched}
        self._before = list(dict.fromkeys(_largest_without(model, ids)))
        self._outputs: defaultdict[nn.Module, list[Any]] = defaultdict(list)
        self._versions: list[tuple[Tensor, int]] = []
        self._open, self._inside = True, 0

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, the next forward is remembered."""
        self.forget()
        with ExitStack() as stack:
            for module in self._before:
                stack.callback(module.register_forward_pre_hook(self._enter).remove)
                stack.callback(module.register_forward_hook(self._record).remove)
            for module in self._watched:
                stack.callback(module.register_forward_pre_hook(self._close).remove)
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Inside, forwards of the same batch skip what is remembered."""
        if any(tensor._version != version for tensor, version in self._versions):
            self.forget()
        with ExitStack() as stack:
            for module, outputs in self._outputs.items():
                module.forward = _given(module.forward, list(outputs))
                stack.callback(delattr, module, "forward")
            yield

    def forget(self) -> None:
        """Drop what is remembered."""
        self._outputs.clear()
        self._versions.clear()
        self._open, self._inside = True, 0

    def _enter(self, *_: Any) -> None:
        self._inside += 1

    def _record(self, module: nn.Module, _: Any, output: Any) -> None:
        self._inside -= 1
        if self._open and not self._inside:
            self._outputs[module].append(output)
            leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            self._versions += [(tensor, tensor._version) for tensor in leaves]

    def _close(self, *_: Any) -> None:
        self._open = False


def _given(forward: Callable[..., Any], outputs: list[Any]) -> Callable[..., Any]:
    outputs.reverse()

    def again(*args: Any, **kwargs: Any) -> Any:
        return outputs.pop() if outputs else forward(*args, **kwargs)

    return again


def _largest_without(model: nn.Module, watched: set[int]) -> list[nn.Module]:
    if not any(id(module) in watched for module in model.modules()):
        return [model]
    if id(model) in watched:
        return []
    return [found for child in model.children() for found in _largest_without(child, watched)]
