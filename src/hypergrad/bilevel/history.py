"""The table of a loop: one record per outer step."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, Literal, TypeAlias, overload

import torch

from hypergrad._saving import check_form, check_keys
from hypergrad.errors import missing_extra
from hypergrad.linsolve import Status
from hypergrad.verification.differences import Verdict

Value: TypeAlias = float | str | None
"""An entry of the table: a number, the name of a status, or nothing."""


@dataclass(frozen=True)
class Record(Mapping[str, Value]):
    """One outer step: its fields, and a mapping of all columns, metrics and outer parameters too.

    Attributes:
        step: its number, from 1.
        inner_steps: how many steps of θ were made so far.
        inner_loss: the mean of f over the inner steps of this outer step, each before its update.
        outer_loss: g where the hypergradient was taken: before the update of φ.
        hypergradient_norm: ``‖dg/dφ‖₂`` before clipping.
        seconds: the time of the step, without callbacks.
        inner_lr: learning rate of θ, where it is one number.
        outer_lr: learning rate of φ, where it is one number.
        inner_grad_norm: ``‖∂_θ f‖₂`` where the hypergradient was taken: how far θ is from a
            solution.
        status: how the linear solve ended, where there is one: the name of a :class:`hg.Status`.
        iterations: of the solve.
        matvecs: products with second derivatives.
        relative_residual: of the solve, if measured.
        multiplier: of a penalty method.
        verification: whether the derivatives agree with differences, in the steps that verified
            them: the name of a :class:`hg.Verdict`.
        damping: λ of the linear solve.
        metrics: what the objectives (``"inner/name"``, ``"outer/name"``) and callbacks add.
        hparams: φ after the step: each element if there are few, else mean and deviation by tensor.
    """

    step: int
    inner_steps: int
    inner_loss: float
    outer_loss: float
    hypergradient_norm: float
    seconds: float
    inner_lr: float | None = None
    outer_lr: float | None = None
    inner_grad_norm: float | None = None
    status: str | None = None
    iterations: int | None = None
    matvecs: int = 0
    relative_residual: float | None = None
    multiplier: float | None = None
    verification: str | None = None
    damping: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    hparams: Mapping[str, float] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Value:
        """Return the entry of a column: a field, a metric, an outer parameter; or ``KeyError``."""
        return self.row()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.row())

    def __len__(self) -> int:
        return len(self.row())

    def row(self) -> dict[str, Value]:
        """All columns, metrics and outer parameters among them."""
        fields = {key: value for key, value in vars(self).items() if key not in _GROUPS}
        every = {**fields, **self.metrics, **self.hparams}
        # A NaN would be no JSON, and says no more than that there is no number.
        return {key: None if value != value else value for key, value in every.items()}

    def with_metrics(self, metrics: Mapping[str, float]) -> Record:
        """Return this record with the metrics of a callback."""
        return replace(self, metrics={**self.metrics, **metrics})


_GROUPS = ("metrics", "hparams")
# What stands for an entry that is not there.
_NOTHING = {
    f.name: math.nan if f.default is MISSING else f.default
    for f in fields(Record)
    if f.name not in _GROUPS
}


class History(Sequence[Record]):
    """The records of all outer steps: ``history[-1]`` is one, ``history["outer_loss"]`` a column.

    Numbers are kept as numbers, eight bytes each.

    Examples:
        >>> from hypergrad.bilevel.history import History, Record
        >>> history = History()
        >>> for k in (1, 2):
        ...     history.append(Record(k, 10 * k, 1.0 / k, 2.0 / k, 0.5, 0.01))
        >>> history["outer_loss"], len(history), history[-1]["inner_steps"]
        ([2.0, 1.0], 2, 20)
        >>> history.best("outer_loss")["step"]
        2
    """

    def __init__(self) -> None:
        self._columns: dict[str, array[float]] = {}
        self._words: dict[str, list[str | None]] = {name: [] for name in _WORDS}
        self._hparams: list[str] = []

    def append(self, record: Record) -> None:
        """Add a row; a new column is empty above it."""
        for name in record.hparams:
            if name not in self._columns:
                self._hparams.append(name)
        rows = len(self)
        row = record.row()
        words = {name: row.pop(name) for name in _WORDS}
        for name in row:
            if name not in self._columns:
                self._columns[name] = array("d", [math.nan] * rows)
        for name, column in self._columns.items():
            value = row.get(name)
            column.append(math.nan if value is None else float(value))
        for name, word in words.items():
            self._words[name].append(word if word is None else str(word))

    def __len__(self) -> int:
        return len(self._words["status"])

    @property
    def columns(self) -> list[str]:
        """The names of the columns that have an entry."""
        used = [
            name
            for name, column in self._columns.items()
            if not all(math.isnan(entry) for entry in column)
        ]
        return used + [name for name, words in self._words.items() if any(words)]

    @property
    def hparams(self) -> list[str]:
        """The columns that hold outer parameters."""
        return list(self._hparams)

    @overload
    def __getitem__(self, key: str) -> list[Any]: ...

    @overload
    def __getitem__(self, key: int) -> Record: ...

    @overload
    def __getitem__(self, key: slice) -> list[Record]: ...

    def __getitem__(self, key: str | int | slice) -> Any:
        """Return a column by name (``None`` where it is empty), or records by number.

        It raises ``KeyError`` or ``IndexError`` where there is none.
        """
        if isinstance(key, str):
            if key in self._words:
                return list(self._words[key])
            if key not in self._columns:
                raise KeyError(f"no column {key!r}; there are {', '.join(self.columns)}")
            return [_entry(key, number) for number in self._columns[key]]
        if isinstance(key, slice):
            return [self[i] for i in range(*key.indices(len(self)))]
        entries = {name: _entry(name, column[key]) for name, column in self._columns.items()}
        entries |= {name: words[key] for name, words in self._words.items()}
        own: dict[str, Any] = {
            name: nothing if entries.get(name) is None else entries[name]
            for name, nothing in _NOTHING.items()
        }
        rest: dict[str, Any] = {
            name: math.nan if value is None else value
            for name, value in entries.items()
            if name not in own
        }
        hparams = {name: rest.pop(name) for name in self._hparams}
        return Record(**own, metrics=rest, hparams=hparams)

    def best(self, column: str = "outer_loss", *, mode: Literal["min", "max"] = "min") -> Record:
        """The record where a column is least, or largest; the first of several.

        ``outer_loss`` is taken before the update of φ: ``hg.bilevel.KeepBest`` keeps the φ that it
        belongs to.

        Raises:
            KeyError: there is no such column.
            ValueError: the column has no number, or ``mode`` is neither.
        """
        if mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max', got {mode!r}")
        sign = 1.0 if mode == "min" else -1.0
        entries = self[column]
        numbers = [
            (sign * value, i) for i, value in enumerate(entries) if isinstance(value, (int, float))
        ]
        if not numbers:
            raise ValueError(f"column must hold numbers, got {column!r} with none")
        return self[min(numbers)[1]]

    def to_pandas(self) -> Any:
        """The table as a ``pandas.DataFrame``.

        Raises:
            ImportError: pandas is not installed; ``pip install 'hypergrad[pandas]'``.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise missing_extra("to_pandas", "pandas") from error

        return pd.DataFrame({name: self[name] for name in self.columns})

    def state_dict(self) -> dict[str, Any]:
        """The table in tensors and lists."""
        return {
            "columns": {
                name: torch.tensor(column, dtype=torch.float64)
                for name, column in self._columns.items()
            },
            "words": {
                name: [_WORDS[name].index(word) for word in words]
                for name, words in self._words.items()
            },
            "hparams": list(self._hparams),
        }

    def check_state(self, state: Any) -> None:
        """Raise ``ValueError`` unless :meth:`load_state_dict` could take ``state``."""
        check_keys(state, ("columns", "words", "hparams"), "the history")
        columns, words, hparams = state["columns"], state["words"], state["hparams"]
        check_keys(words, tuple(_WORDS), "the words of the history")
        if not (isinstance(columns, dict) and all(isinstance(w, list) for w in words.values())):
            raise ValueError("the history must have a dict of columns and lists of words")
        rows = torch.empty(len(words["status"]), dtype=torch.float64)
        check_form(columns, dict.fromkeys(columns, rows), "the columns of the history")
        for name, known in _WORDS.items():
            if len(words[name]) != len(rows):
                raise ValueError(f"the history must have {len(rows)} entries of {name!r}")
            if any(type(code) is not int or not 0 <= code < len(known) for code in words[name]):
                raise ValueError(f"the codes of {name!r} must be from 0 to {len(known) - 1}")
        if not isinstance(hparams, list) or not set(hparams) <= columns.keys():
            raise ValueError("the history must have a list of columns that are outer parameters")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the table that :meth:`state_dict` returned."""
        columns = state["columns"].items()
        self._columns = {name: array("d", values.tolist()) for name, values in columns}
        self._words = {
            name: [_WORDS[name][code] for code in codes] for name, codes in state["words"].items()
        }
        self._hparams = list(state["hparams"])


_WORDS: dict[str, list[str | None]] = {
    "status": [None, *(status.name for status in Status)],
    "verification": [None, *(verdict.name for verdict in Verdict)],
}
_COUNTS = ("step", "inner_steps", "iterations", "matvecs")


def _entry(name: str, number: float) -> Value:
    if math.isnan(number):
        return None
    return int(number) if name in _COUNTS else number
