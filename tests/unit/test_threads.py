"""An operator's decision on how threads wait is left alone."""

from __future__ import annotations

import pytest

from mii_serve.threads import SPIN_COUNT, WAIT_VARIABLES, wait_settings


@pytest.mark.parametrize("name", sorted(WAIT_VARIABLES))
def test_either_variable_is_a_decision(name: str) -> None:
    assert wait_settings({name: ""}) == {}


def test_a_number_of_threads_is_no_decision_on_how_they_wait() -> None:
    assert wait_settings({"OMP_NUM_THREADS": "4"}) == {"GOMP_SPINCOUNT": str(SPIN_COUNT)}
