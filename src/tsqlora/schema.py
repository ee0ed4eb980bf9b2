"""YAML read by the type hints of dataclasses, with all that is wrong reported together."""

from __future__ import annotations

import math
import numbers
import types
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from tsqlora.errors import ConfigError

_NAMES: Mapping[Any, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    types.NoneType: "null",
    Mapping: "a mapping of keys",
}


@dataclass(frozen=True)
class Rule:
    """A condition on a value, as metadata of `Annotated`; `text` goes on after the type's name."""

    text: str
    holds: Callable[[Any], bool]


class _Loader(yaml.SafeLoader):
    """A loader that refuses a key given twice, where PyYAML keeps the last in silence."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for i, key in enumerate(names):
            if key.value in {name.value for name in names[:i]}:
                problem = f"the key {key.value} stands twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """The value that `text` holds, in plain types."""
    return yaml.load(text, _Loader)


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        ConfigError: there is none, or it is not YAML; with the line.
    """
    try:
        mapping = parse_yaml(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ConfigError(
            f"{path}, line {line}: not valid YAML, {error.problem}. "
            "Text that holds any of { } : # goes in quotes."
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML in UTF-8, {error}.") from None
    if not isinstance(mapping, dict):
        raise ConfigError(
            f"{path} must hold a mapping (model: ..., task: ...), not {say(mapping)}."
        )
    return mapping


def read(cls: Any, given: Any, where: str, problems: list[str]) -> dict[str, Any]:
    """Keyword arguments for the dataclass `cls` from a mapping of its shape, sections built.

    What is wrong is added to `problems`, named by `where` and the key. A bad value then stays as it
    is and a missing one is None, so that relations between fields can still be looked at.
    """
    if given is not None and not isinstance(given, Mapping):
        problems.append(f"{where.rstrip('.') or 'it'} must be a mapping of keys, not {say(given)}")
        given = None
    hints = get_type_hints(cls, include_extras=True)
    given = dict(given or {})
    for name, hint in hints.items():
        if is_dataclass(hint):
            given.setdefault(name, None)
    values = fit_keys(hints, given, where, problems)
    for each in fields(cls):
        if each.name not in given and each.default is each.default_factory is MISSING:
            problems.append(f"{where}{each.name} is required")
            values[each.name] = None
    return values


def fit_keys(
    hints: Mapping[str, Any], given: Mapping[str, Any], where: str, problems: list[str]
) -> dict[str, Any]:
    """The values of `given` under the keys of `hints`; all others are problems."""
    values = {}
    for key, value in given.items():
        name, hint = f"{where}{key}", hints.get(key)
        if hint is None:
            problems.append(f"{name}: unknown key{_nearest(str(key), where, hints)}")
        elif is_dataclass(hint):
            values[key] = hint(**read(hint, value, f"{name}.", problems))  # type: ignore[operator]
        else:
            try:
                values[key] = fit(hint, value)
            except ValueError:
                problems.append(f"{name} must be {describe(hint)}, not {say(value)}")
                values[key] = value
    return values


def fit(hint: Any, value: Any) -> Any:
    """`value` as `hint` asks for it: lists become tuples, numbers written as text numbers.

    Raises:
        ValueError: it cannot be.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _fit_annotated(args, value)
    if origin in (Union, types.UnionType):
        return _fit_union(args, value)
    if origin is Literal:
        return args[args.index(value)]
    if origin is tuple:
        return _fit_tuple(args, value)
    if hint in (int, float):
        return _number(hint, value)
    if hint is Any:
        return plain(value, strict=True)
    if origin is Mapping and value is None:
        return {}
    if not isinstance(value, origin or hint):
        raise ValueError(value)
    return plain(value)


def describe(hint: Any) -> str:
    """What `hint` asks for, in words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return describe(args[0]) + "".join(e.text for e in args[1:] if isinstance(e, Rule))
    if origin in (Union, types.UnionType, Literal):
        words = [str(arg) if origin is Literal else describe(arg) for arg in args]
        return ", ".join(words[:-1]) + f" or {words[-1]}" if len(words) > 1 else words[0]
    if origin is tuple:
        count = "" if args[1] is ... else f"{len(args)} times "
        return f"a list ({count}{describe(args[0])})"
    return _NAMES.get(origin or hint, "made of plain YAML values")


def plain(value: Any, strict: bool = False) -> Any:
    """`value` with mappings as dicts, sequences as lists and enums as their values, all through.

    Raises:
        ValueError: `strict`, and YAML's plain types cannot hold it.
    """
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, Mapping):
        return {plain(key, strict): plain(item, strict) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, strict) for item in value]
    if isinstance(value, str):
        return str(value)
    if strict and not isinstance(value, bool | int | float | types.NoneType):
        raise ValueError(value)
    return value


def say(value: Any) -> str:
    """`value` as it would stand in YAML, shortened."""
    if value is None:
        return "null"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _fit_annotated(args: tuple[Any, ...], value: Any) -> Any:
    value = fit(args[0], value)
    for extra in args[1:]:
        if not isinstance(extra, Rule):
            value = extra(value)
        elif not extra.holds(value):
            raise ValueError(value)
    return value


def _fit_union(args: tuple[Any, ...], value: Any) -> Any:
    """The first member that fits, text last: `0.1` in quotes is a number where one may stand."""
    for arg in sorted(args, key=lambda arg: describe(arg).startswith(_NAMES[str])):
        with suppress(ValueError):
            return fit(arg, value)
    raise ValueError(value)


def _fit_tuple(args: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(value)
    parts = [args[0]] * len(value) if args[1] is ... else args
    return tuple(fit(part, item) for part, item in zip(parts, value, strict=True))


def _number(kind: type[int] | type[float], value: Any) -> int | float:
    """A finite number; YAML 1.1 reads `1e-3` as text."""
    if isinstance(value, str):
        value = float(value) if any(c in value for c in ".eEnN") else int(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    value = float(value)
    if not math.isfinite(value) or (kind is int and value != int(value)):
        raise ValueError(value)
    return int(value) if kind is int else value


def _nearest(key: str, where: str, hints: Mapping[str, Any]) -> str:
    """Advice for an unknown key: the nearest one, or the section that has one of this name."""
    near = get_close_matches(key, hints, n=1, cutoff=0.6)
    homes = [
        f"{name}.{key}" for name, h in hints.items() if key in getattr(h, "__annotations__", ())
    ]
    if near or homes:
        return f"; did you mean {homes[0] if homes else where + near[0]}?"
    return f"; the keys here are {', '.join(hints)}" if len(hints) < 20 else ""
