"""Class labels of any type ─► their names, and the classes of a column in a stable order."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Value

from tsqlora.errors import DataError, short

_FEW_CLASSES = 100
_RARE = 0.1
"""Of an even share of the rows."""


def is_label(value: Any) -> bool:
    """Whether there is a label or number at all: not None, NaN or blank."""
    return value is not None and value == value and bool(str(value).strip())


def label_name(value: Any) -> str:
    """The name of a label: a text as it stands, True or False, a whole number.

    Raises:
        DataError: a fraction, or no single value at all.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, int) or (isinstance(value, float | Decimal) and float(value).is_integer()):
        return str(value) if isinstance(value, bool) else str(int(value))
    raise DataError(
        f"{value!r} is no class label. Use whole numbers or names, or `task: regression`."
    )


def class_names(train: Dataset, column: str, where: str) -> tuple[str, ...]:
    """The names of the classes in `column`: numbers in their order, names in that of the alphabet.

    A ClassLabel feature gives its own names in its own order.

    Raises:
        DataError: there are no two classes, or so many that they look like numbers or texts.
    """
    feature = train.features[column]
    if not isinstance(feature, ClassLabel | Value):
        raise DataError(
            f"{where}: {column!r} holds lists or records, not labels. Name a column of single "
            "values, or mend it."
        )
    used = [value for value in train.unique(column) if is_label(value)]
    if isinstance(feature, ClassLabel):
        used = [value for value in used if value >= 0]
    if len(used) < 2:
        found = f"only the class {used[0]!r}" if used else "no label at all"
        raise DataError(f"{where}: {column!r} holds {found}; two classes at least are needed.")
    if len(used) > _FEW_CLASSES and 2 * len(used) > len(train):
        raise DataError(
            f"{where}: {column!r} holds {len(used)} different labels in {len(train)} rows; for "
            "numbers use `task: regression`, for texts `task: seq2seq` or `causal-lm`."
        )
    if isinstance(feature, ClassLabel):
        return tuple(feature.names)
    try:
        return tuple(dict.fromkeys(label_name(value) for value in sorted(used)))
    except DataError as error:
        raise DataError(f"{where}: {column!r}: {error}") from None


def label_notes(
    train: Dataset, columns: Sequence[str], target: str, names: Iterable[str]
) -> list[str]:
    """What to tell of the labels in column `target`, found without any model.

    Classes that differ in case or spaces alone, -1 where it is rarer by far than 0, 1, ..., and
    inputs, equal in all `columns` but the target, that come with more than one label.
    """
    texts = [name for name in columns if name != target]
    found = (_spelling(names), _no_label(train, target), _contradictions(train, texts, target))
    return [note for note in found if note]


def _spelling(names: Iterable[str]) -> str:
    alike: dict[str, list[str]] = {}
    for name in names:
        folded = unicodedata.normalize("NFKC", name).casefold()
        alike.setdefault(" ".join(folded.split()), []).append(name)
    doubled = [" / ".join(map(repr, group)) for group in alike.values() if len(group) > 1]
    if not doubled:
        return ""
    more = f" and {len(doubled) - 5} more" if len(doubled) > 5 else ""
    return (
        f"Classes that differ only in case or spaces: {', '.join(doubled[:5])}{more}. They are "
        "learnt as classes of their own; if they are one, write them alike in the data."
    )


def _no_label(train: Dataset, target: str) -> str:
    values = train.select_columns([target]).with_format("arrow")[:][target]
    if not pa.types.is_integer(values.type) or isinstance(train.features[target], ClassLabel):
        return ""
    counts = {n["values"]: n["counts"] for n in values.drop_null().value_counts().to_pylist()}
    rare = counts.get(-1, 0)
    if not rare or min(counts) < -1 or rare * len(counts) > _RARE * len(train):
        return ""
    return (
        f"The label -1 stands in {rare:,} rows: in many data sets (SNLI) it says that a row has no "
        "label. It is learnt as a class; if it is none, drop these rows."
    )


def _contradictions(train: Dataset, texts: Sequence[str], target: str) -> str:
    feature = train.features[target]
    named = isinstance(feature, ClassLabel)
    if not texts or not all(isinstance(train.features[name], Value) for name in texts):
        return ""  # of lists, which are refused as texts
    keys = [f"text{i}" for i in range(len(texts))]
    table = train.select_columns([*texts, target]).with_format("arrow")[:]
    table = table.select([*texts, target]).rename_columns([*keys, "label"]).drop_null()
    if named:
        table = table.filter(pc.greater_equal(table["label"], 0))
    wanted = [("label", how) for how in ("count_distinct", "distinct", "count")]
    several = table.group_by(keys, use_threads=False).aggregate(wanted)
    several = several.filter(pc.greater(several["label_count_distinct"], 1))
    if not len(several):
        return ""
    rows = pc.sum(several["label_count"]).as_py()
    text, labels = several[keys[0]][0].as_py(), several["label_distinct"][0].as_py()
    said = sorted(feature.int2str(n) if named else str(n) for n in labels)
    return (
        f"{rows:,} rows have an input that comes with another label too, such as "
        f"{short(str(text))} ({', '.join(said[:5])}): at most one of them can be right."
    )
