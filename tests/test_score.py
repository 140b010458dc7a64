"""What a metric says: margins, how many samples may change, and what that promises of others."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantcli.evaluation.metrics import TopK
from quantcli.tune.score import CONFIDENCE, Score, compared, largest_loss, likely_share, margins


def test_a_scores_uncertainty_is_that_of_paired_differences() -> None:
    score = Score(90.0, 91.0, 400, 16)
    assert score.drop == 1.0
    assert score.uncertainty == 1.0
    assert score.worst == 1.0 + 100 * largest_loss(16) / 400
    assert Score(92.0, 91.0, 400, 16).worst == 100 * largest_loss(16) / 400  # a gain is luck
    assert Score(91.0, 91.0, 400, 0).worst == 0.0  # nothing has changed, and nothing is near it
    assert Score(91.0, 91.0, 400, 0, 1.0).uncertainty == 0.25  # the next one may change
    assert Score(91.0, 91.0, 400, 4, 1.0).uncertainty == 0.5
    nothing = np.zeros(0, bool), np.zeros(0, bool)
    assert compared(nothing, (np.zeros(0), np.zeros(0))).worst == 0.0


def probability_of_more(changing: float, loss: int) -> float:
    """P(L - G > loss) of two Poisson variables of half that mean each, summed term by term."""
    mean = changing / 2
    once = [math.exp(-mean) * mean**k / math.factorial(k) for k in range(120)]
    return sum(once[a] * once[b] for a in range(120) for b in range(120) if a - b > loss)


@settings(max_examples=25, deadline=None)
@given(st.floats(0.001, 40))
def test_the_largest_loss_is_the_least_that_is_exceeded_in_five_of_a_hundred(changing: float) -> None:
    loss = largest_loss(changing)
    assert probability_of_more(changing, loss) <= 0.05 + 1e-9
    assert loss == 0 or probability_of_more(changing, loss - 1) > 0.05 - 1e-9


def test_the_largest_loss_of_many_is_that_of_the_normal_distribution() -> None:
    assert largest_loss(0) == 0
    assert largest_loss(10_000) == pytest.approx(CONFIDENCE * 100, abs=1)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_a_sample_is_right_where_its_margin_is_above_zero(k: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=(20, 5)).astype(np.float32)
    labels = generator.integers(0, 5, 20)
    found = margins(scores, labels, k, probabilities=False)
    for row, label, margin in zip(scores, labels, found, strict=True):
        top = TopK(k)
        top.update(row[None], np.array([label]))
        assert (margin > 0) == (top.hits == 1)
    powers = np.exp(scores.astype(np.float64))
    shares = powers / powers.sum(axis=1, keepdims=True)
    # A softmax adds one number to all logarithms of a row, and leaves their differences.
    assert margins(shares, labels, k, probabilities=True) == pytest.approx(found, abs=1e-9)


def test_every_sample_is_right_where_all_classes_count() -> None:
    scores, labels = np.eye(3), np.arange(3)
    far = margins(scores, labels, 3, probabilities=False)
    assert np.isinf(far).all()
    assert compared((np.ones(3, bool), np.ones(3, bool)), (far, far)).worst == 0.0


@pytest.mark.parametrize("noise", [0.003, 0.01, 0.03])
def test_few_samples_tell_how_many_change_of_many(noise: float) -> None:
    """A share that 300 samples cannot count follows from their margins; 200,000 others bear it out."""
    generator = np.random.default_rng(5)

    def drawn(samples: int) -> tuple[np.ndarray, np.ndarray]:
        margin = generator.normal(1.0, 1.0, samples)
        return margin, margin + generator.normal(0.0, noise, samples)

    margin, moved = drawn(200_000)
    share = float(((margin > 0) != (moved > 0)).mean())
    estimates = [
        likely_share(np.abs(margin), np.abs(margin - moved)) for margin, moved in (drawn(300) for _ in range(200))
    ]
    # 17 samples tell it within 30 %, and half of that is allowed for once more (1.645 standard errors).
    assert 1.2 < float(np.mean(estimates)) / share < 1.8
    assert np.mean(np.array(estimates) < share) <= 0.1  # 5 of 100 are meant; of 200 draws, up to 20 are chance


def test_samples_on_the_boundary_change_where_anything_moves() -> None:
    assert likely_share(np.zeros(100), np.zeros(100)) == 0.0
    assert likely_share(np.zeros(100), np.full(100, 1e-9)) > 0.1
    assert likely_share(np.ones(100), np.zeros(100)) == 0.0
