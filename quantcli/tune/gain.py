"""Gain correction: what the last layers give too little of altogether is made up for by their weights' scales.

Ranges that cut the largest values make what a network gives smaller in proportion (of a ResNet-56 by 1 %, a tenth of all its
noise). What a bias is for the mean, one factor is for the proportion: Σ y·ỹ / Σ ỹ², which leaves the least squared error. A batch
normalisation whose variance is measured again behind quantized layers does that channel by channel (Hubara et al. 2020, arXiv
2006.10518, batch-norm tuning); a single number per layer follows no sample. Integers stay as they are. A factor below 1 is left:
where much is lost, it would make outputs smaller, and their error with them, without telling more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from quantcli.tune.bias import channel_means

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

# Layers that may have it: what they give is proportional to their weights, but for the bias.
SCALED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


def gain_of(
    real: Sequence[NDArray[np.float32]], made: Sequence[NDArray[np.float32]], centred: bool
) -> tuple[np.float32, float, float]:
    """Return the factor of a layer's outputs that leaves the least error, and the squared errors without it and with it.

    1 and no errors, where it is no more than 1.

    Args:
        real: Batches of the float layer's outputs.
        made: The same of the quantized layer.
        centred: Whether a bias makes up for the mean of each channel of the second axis, which does not count then.
    """
    means = [np.zeros(1), np.zeros(1)]
    if centred:
        means = [channel_means(side).reshape(-1, *[1] * (real[0].ndim - 2)) for side in (made, real)]
    both = mine = wanted = 0.0
    for batches in zip(made, real, strict=True):
        ours, theirs = (batch - mean.astype(np.float32) for batch, mean in zip(batches, means, strict=True))
        both += float(np.vdot(ours, theirs))
        mine += float(np.vdot(ours, ours))
        wanted += float(np.vdot(theirs, theirs))
    if not (np.isfinite([both, mine, wanted]).all() and both > mine > 0):
        return np.float32(1), 0.0, 0.0
    return np.float32(both / mine), mine - 2 * both + wanted, wanted - both * both / mine
