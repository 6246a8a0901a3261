"""Which sizes are declared, and which one a turn is padded to."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mii_serve.engine.native.lattice import TurnSize, choose, declare


@st.composite
def turns(draw: st.DrawFn, max_slots: int = 24) -> TurnSize:
    n = draw(st.integers(1, max_slots))
    return TurnSize(n, n + draw(st.integers(0, n)), 64, 64)


def test_powers_of_two_with_and_without_guidance_largest_first():
    sizes = [(size.num_samples, size.num_rows) for size in declare(6, 64, 64)]
    assert sizes == [(6, 12), (4, 8), (6, 6), (4, 4), (2, 4), (2, 2), (1, 2), (1, 1)]


@given(turns())
def test_every_turn_of_the_declared_shape_has_a_size_that_holds_it(turn):
    lattice = declare(24, 64, 64)
    chosen = choose(lattice, turn)
    assert chosen is not None and chosen.holds(turn)
    assert chosen.num_cells == min(size.num_cells for size in lattice if size.holds(turn))


@given(turns())
def test_padding_costs_less_than_twice_the_rows_when_all_are_guided(turn):
    guided = TurnSize(turn.num_samples, 2 * turn.num_samples, 64, 64)
    assert choose(declare(24, 64, 64), guided).num_rows < 2 * guided.num_rows


def test_what_the_lattice_lacks_has_no_size():
    lattice = declare(4, 64, 64)
    assert choose(lattice, TurnSize(1, 2, 64, 96)) is None
    assert choose(lattice, TurnSize(5, 5, 64, 64)) is None
    assert choose((), TurnSize(1, 1, 64, 64)) is None


def test_a_size_holds_no_more_guided_samples_than_it_has_rows_for():
    assert TurnSize(4, 8, 8, 8).holds(TurnSize(3, 6, 8, 8))
    assert not TurnSize(4, 4, 8, 8).holds(TurnSize(3, 4, 8, 8))
    assert not TurnSize(4, 8, 8, 8).holds(TurnSize(4, 8, 8, 16))
