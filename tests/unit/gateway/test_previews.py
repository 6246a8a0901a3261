"""As many previews as were asked for come before the last call, whatever the number of steps."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mii_serve.gateway.dialects.openai import _preview_every


@given(steps=st.integers(1, 1000), extra_calls=st.integers(0, 1000), partials=st.integers(1, 3))
def test_there_are_enough_previews(steps, extra_calls, partials):
    every = _preview_every(steps, partials)
    assert every is not None and every >= 1
    shown = [call for call in range(1, steps + extra_calls) if call % every == 0]
    assert len(shown) >= min(partials, steps - 1)
    if steps > partials:
        assert shown[partials - 1] <= steps * partials / (partials + 1)


def test_none_are_made_where_none_were_asked_for():
    assert _preview_every(50, None) is None and _preview_every(50, 0) is None
