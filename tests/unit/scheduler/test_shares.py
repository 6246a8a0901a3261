"""An address has one share of a busy replica, whatever names it makes up."""

from __future__ import annotations

import itertools

import pytest
from player import Player, request, scheduler_of


def shares(names: dict[str, object], turns: int = 600) -> dict[str, int]:
    """Images let in for each address in so many turns; each keeps eight requests in line, named by its iterator."""
    scheduler = scheduler_of(max_slots=1)
    calls = dict.fromkeys((f"{address} {i}" for address in names for i in range(turns * 2)), 2)
    player, numbers = Player(scheduler, calls), itertools.count()
    owners: dict[str, str] = {}
    for _ in range(turns):
        for address, clients in names.items():
            in_line = sum(owners[name] == address for name in owners if name in scheduler._line)
            for _ in range(8 - in_line):
                name = f"{address} {next(numbers)}"
                calls[name], owners[name] = 2, address
                scheduler.add(request(name, client=next(clients)), 0.0)
        player.turn()
        owners = {name: owner for name, owner in owners.items() if name in scheduler._line}
    joined = [sample.request_id.partition(" ")[0] for sample in player.joined]
    return {address: joined.count(address) for address in names}


def fresh(address: str):
    return (f"{address}/made up {i}" for i in itertools.count())


def test_a_new_name_for_each_request_gains_nothing():
    got = shares({"1.1.1.1": fresh("1.1.1.1"), "2.2.2.2": itertools.repeat("2.2.2.2")})
    assert got["2.2.2.2"] == pytest.approx(got["1.1.1.1"], abs=0.1 * got["1.1.1.1"])


def test_a_name_is_no_disadvantage_either():
    got = shares({"1.1.1.1": itertools.repeat("1.1.1.1/one"), "2.2.2.2": itertools.repeat("2.2.2.2")})
    assert abs(got["2.2.2.2"] - got["1.1.1.1"]) <= 2


def test_callers_behind_one_address_share_its_part_among_them():
    scheduler = scheduler_of(max_slots=1)
    names = [f"busy-{i}" for i in range(50)] + ["modest"]
    player = Player(scheduler, dict.fromkeys(names, 2))
    for name in names:
        scheduler.add(request(name, client="9.9.9.9/" + name.partition("-")[0]), 0.0)
    while player.turn() is not None:
        pass
    assert [sample.request_id for sample in player.joined].index("modest") <= 2


def test_nothing_is_kept_of_who_has_left():
    scheduler = scheduler_of(max_slots=1)
    for i in range(100):
        scheduler.add(request(f"r{i}", client=f"1.1.1.1/{i}"), 0.0)
    for i in range(100):
        scheduler.drop(f"r{i}")
    assert not scheduler._line._waiting and not scheduler._line._last_tag
