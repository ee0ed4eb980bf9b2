"""The second forward of a batch, begun where it first differs from the one before."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


class Replay:
    """Remembers what leaves the modules that ran before any of `watched` did, and gives it again.

    Exact where the model is a function of its inputs and only `watched` modules have changed since:
    all that ran before them would give the same again. The modules remembered are the largest that
    hold none of `watched`, a whole layer each, mostly.
    """

    def __init__(self, model: nn.Module, watched: Iterable[nn.Module]) -> None:
        self._watched = list(watched)
        self._before = _largest_without(model, {id(module) for module in self._watched})
        self._outputs: defaultdict[nn.Module, list[Any]] = defaultdict(list)
        self._open = True

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, the next forward is remembered."""
        self.forget()
        with ExitStack() as stack:
            for module in self._before:
                stack.callback(module.register_forward_hook(self._record).remove)
            for module in self._watched:
                stack.callback(module.register_forward_pre_hook(self._close).remove)
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Inside, forwards of the same batch skip what is remembered."""
        with ExitStack() as stack:
            for module, outputs in self._outputs.items():
                module.forward = _given(module.forward, list(outputs))
                stack.callback(delattr, module, "forward")
            yield

    def forget(self) -> None:
        """Drop what is remembered."""
        self._outputs.clear()
        self._open = True

    def _record(self, module: nn.Module, _: Any, output: Any) -> None:
        if self._open:
            self._outputs[module].append(output)

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
