"""`tsqlora score`'s own settings: how long a pool is adapted to."""

import math

from hypothesis import given
from hypothesis import strategies as st

from tsqlora.score_only import (
    BATCH,
    EPOCHS,
    LARGE,
    LARGE_EPOCHS,
    LEAST_STEPS,
    MOST_EPOCHS,
    MOST_STEPS,
    adaptation_steps,
)


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_a_larger_pool_is_never_adapted_to_for_fewer_steps(first: int, second: int) -> None:
    few, many = sorted((first, second))
    assert adaptation_steps(few) <= adaptation_steps(many)


@given(st.integers(1, 10**7))
def test_every_row_is_passed_once_at_least_and_a_few_times_at_most(rows: int) -> None:
    epoch = math.ceil(rows / BATCH)
    assert epoch <= adaptation_steps(rows) <= max(MOST_EPOCHS * epoch, LEAST_STEPS)


def test_small_pools_reach_the_least_steps_and_large_ones_get_an_epoch_more() -> None:
    assert adaptation_steps(20 * BATCH) == LEAST_STEPS
    assert adaptation_steps(100 * BATCH) == EPOCHS * 100
    assert adaptation_steps(LARGE) == LARGE_EPOCHS * LARGE // BATCH
    assert adaptation_steps(5000 * BATCH) == MOST_STEPS
