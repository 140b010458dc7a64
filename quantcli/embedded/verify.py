"""`quantcli verify --c`: a folder of C source, compiled, against the executor of the model that stands in it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.embedded.check import FLAGS, built, compiler, outputs_of
from quantcli.embedded.deliver import Compared, executor_of, integers_of, single_samples, tally
from quantcli.errors import EmbeddedError, ModelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from quantcli.embedded.describe import Description
    from quantcli.sidecar import Sidecar

# Samples that are run at once: their integers are held until then.
AT_ONCE = 64


def verify_source(
    folder: Path,
    description: Description,
    sidecar: Sidecar,
    batches: Iterable[Mapping[str, NDArray[Any]]],
    command: str | None = None,
    flags: Sequence[str] = FLAGS,
) -> Compared:
    """Compile the source in a folder, and compare every output with the executor's.

    Args:
        folder: The folder, which holds the quantized model too.
        description: What it says of itself.
        sidecar: The sidecar in it.
        batches: Inputs.
        command: The compiler; None for the first that there is.
        flags: Its flags.

    Raises:
        EmbeddedError: If there is no compiler, or it does not take the source.
    """
    found = compiler(command)
    if found is None:
        raise EmbeddedError("there is no C compiler on the path", "install one, or name it (--cc)")
    model = folder / sidecar.model.name
    if not model.is_file():
        raise ModelError(f"{folder} speaks of {sidecar.model.name}, which is not in it", "put it there")
    executor = executor_of(model.read_bytes(), sidecar)
    compared = Compared(found)
    with tempfile.TemporaryDirectory(prefix="quantcli-") as place:
        executable = built(folder, description, Path(place), found, flags)
        given, expected = [], []
        for batch in batches:
            for feeds in single_samples(executor, batch):
                ins, outs = integers_of(executor, description, feeds)
                given.append(ins)
                expected.append(outs)
                if len(given) == AT_ONCE:
                    tally(compared, description, outputs_of(executable, description, given), expected)
                    given, expected = [], []
        if given:
            tally(compared, description, outputs_of(executable, description, given), expected)
    return compared
