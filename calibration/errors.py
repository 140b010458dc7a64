"""Errors that are reported to the user in one line, drawn as a tree.

::

    ReportedError                 something outside the program is wrong; exit code 1
    ├── DataError                 the calibration or evaluation data cannot be used
    ├── RunError                  the runtime refuses the model, or fails while running it
    ├── StatisticsError           a statistics file cannot be used
    └── quantcli.errors.*         the same, for models, recipes, plans and outputs
"""

from __future__ import annotations

from typing import ClassVar


class ReportedError(Exception):
    """An error in what the user gave us: what is wrong, where, and what to do about it.

    Args:
        what: What is wrong and where, naming the file, tensor or operator.
        remedy: What the user can do about it; empty where there is nothing to add.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(what, remedy)
        self.what = " ".join(what.split())
        self.remedy = " ".join(remedy.split())

    def __str__(self) -> str:
        return f"{self.what}; {self.remedy}" if self.remedy else self.what


class DataError(ReportedError):
    """The data cannot be read, does not fit the model, or holds values that cannot be used."""


class RunError(ReportedError):
    """The runtime refuses the model, or fails while running it."""


class StatisticsError(ReportedError):
    """A statistics file cannot be read, or belongs to something else."""
