"""The exception tree of quantcli; the command line turns each into its exit code in one place.

::

    ReportedError (calibration.errors)   exit code 1
    ├── DataError, RunError, StatisticsError
    └── QuantcliError                    1  failed
        ├── ModelError                   1  a model that cannot be loaded or is not ours to convert
        ├── PlanError                    1  no plan can be made
        ├── EmbeddedError                1  no C source can be made of the model, or a compiler refuses it
        ├── OutputError                  1  the output cannot be written, or failed its self-check
        ├── UsageError                   2  the request contradicts itself
        │   └── RecipeError              2  a recipe or target file that cannot be used
        ├── VerifyError                  3  verify found a difference
        └── StrictError                  5  --strict found what it forbids

A missed threshold (exit code 4) is a verdict, not an error: what was to be written is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, ClassVar

from calibration.errors import ReportedError


class QuantcliError(ReportedError):
    """The root of everything that quantcli itself reports."""


class ModelError(QuantcliError):
    """The model cannot be loaded, or is not one that can be converted."""


class PlanError(QuantcliError):
    """No plan can be made from the model, the statistics and the recipe."""


class EmbeddedError(QuantcliError):
    """The model cannot be written as C source, or a compiler does not take it."""


class OutputError(QuantcliError):
    """An output cannot be written, or what was written does not work."""


class UsageError(QuantcliError):
    """The request contradicts itself."""

    exit_code: ClassVar[int] = 2


class RecipeError(UsageError):
    """A recipe or target file cannot be read, or says something that has no meaning."""


class VerifyError(QuantcliError):
    """The sidecar does not tell the truth about the model, or its integers are not the runtime's."""

    exit_code: ClassVar[int] = 3


class StrictError(QuantcliError):
    """``--strict`` was asked for, and something that it forbids was found."""

    exit_code: ClassVar[int] = 5


def kind_of(thing: Any) -> str:
    """Return what something is that was given in place of something else, for a message."""
    return "None" if thing is None else f"of the type {type(thing).__name__}"


def check_kind(given: object, kind: type, what: str, remedy: str) -> None:
    """Check that something is of its kind, where it was given.

    Raises:
        UsageError: If not.
    """
    if given is not None and not isinstance(given, kind):
        raise UsageError(f"the {what} is {kind_of(given)}", remedy)


def check_count(given: object, what: str, least: int = 1) -> None:
    """Check that a number is a whole one and large enough, where it was given.

    Raises:
        UsageError: If not.
    """
    if given is None:
        return
    if isinstance(given, bool) or not isinstance(given, Integral):
        raise UsageError(f"the {what} is {kind_of(given)}, not a whole number", f"give one of at least {least}")
    if given < least:
        raise UsageError(f"the {what} is {given}", f"give a number of at least {least}")


def check_texts(given: object, what: str) -> None:
    """Check that something is several texts, not a single one.

    Raises:
        UsageError: If not.
    """
    if isinstance(given, str) or not isinstance(given, Sequence) or not all(isinstance(one, str) for one in given):
        raise UsageError(f"the {what} are {kind_of(given)}, not texts", "give a list of them")


def check_progress(given: object) -> None:
    """Check that progress can be told.

    Raises:
        UsageError: If what it is told to cannot be called.
    """
    if not callable(given):
        raise UsageError(f"the progress is {kind_of(given)}", "give a function of (stage, done, total)")


def check_named(function: object, what: str) -> None:
    """Check that a function is named, not given: what is named can be imported elsewhere.

    Raises:
        UsageError: If not.
    """
    if function is not None and not isinstance(function, str):
        raise UsageError(f"the {what} is {kind_of(function)}, not a text", "write its name, or module:function")
