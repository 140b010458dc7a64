"""A sidecar as a C header: its biases stand in the model beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantcli.embedded.naming import check_name
from quantcli.embedded.params import header
from quantcli.sidecar import stored_integers

if TYPE_CHECKING:
    from pathlib import Path

    from quantcli.sidecar import Sidecar


def c_header(sidecar: Sidecar, path: Path, name: str) -> str:
    """Return the header of parameters.

    Args:
        sidecar: The sidecar.
        path: Where it stands.
        name: What names in C begin with.

    Raises:
        ModelError: If the model is not beside it, or another one.
        UsageError: If the name is none for C.
    """
    check_name(name)
    return header(sidecar, stored_integers(sidecar, path.with_name(sidecar.model.name), "bias"), name)
