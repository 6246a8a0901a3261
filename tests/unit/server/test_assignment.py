"""Which replica takes what, as values: loads, replicas kept for suspects, and who is to blame."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mii_serve.server.assignment import Evidence, empty_for_suspects, not_reserved, reserved, shares


@dataclass(eq=False)
class FakeReplica:
    work: int = 0
    batch_work: int = 0
    num_running: int = 0
    is_isolated: bool = False


replicas = st.lists(
    st.builds(FakeReplica, work=st.integers(0, 5), num_running=st.integers(0, 3), is_isolated=st.booleans()), max_size=5
)


@pytest.mark.parametrize(
    ("work", "num_images", "counts"),
    [
        ([3, 0], 5, [1, 4]),
        ([2, 1], 5, [2, 3]),
        ([0, 0, 0], 5, [2, 2, 1]),
        ([9, 0], 4, [0, 4]),
    ],
)
def test_images_go_where_least_work_is_left(work, num_images, counts):
    given_replicas = [FakeReplica(work=10 * units) for units in work]
    shared = dict(shares(given_replicas, num_images, 10))
    assert [shared.get(replica, 0) for replica in given_replicas] == counts


def test_only_batch_requests_see_the_work_of_batch_requests():
    given_replicas = [FakeReplica(work=10, batch_work=0), FakeReplica(work=0, batch_work=90)]
    assert shares(given_replicas, 1, 10) == [(given_replicas[1], 1)]
    assert shares(given_replicas, 1, 10, is_batch=True) == [(given_replicas[0], 1)]


@given(replicas, st.integers(1, 40), st.integers(1, 7))
def test_every_image_is_given_out_once_and_no_share_ends_later_than_it_must(up, num_images, work):
    if not up:
        return
    shared = shares(up, num_images, work)
    assert sum(count for _, count in shared) == num_images
    ends = {id(replica): replica.work + work * count for replica, count in shared}
    for replica, _ in shared:  # moving its last image to another one would not end earlier
        assert all(ends[id(replica)] <= ends.get(id(other), other.work) + work for other in up)


@given(replicas, st.integers(0, 6))
def test_suspects_and_others_never_share_a_replica_and_neither_starves(up, num_waiting):
    kept, free = reserved(up, num_waiting), not_reserved(up, num_waiting)
    assert {id(replica) for replica in kept} | {id(replica) for replica in free} == {id(replica) for replica in up}
    assert len(kept) + len(free) == len(up)
    assert all(replica in kept for replica in up if replica.is_isolated)
    if num_waiting and up:
        assert kept, "a replica is emptied, or makes a suspect already"
    if len(up) > 1 and sum(replica.is_isolated for replica in up) < len(up):
        assert free, "one stays open for everything else"
    if not num_waiting:
        assert kept == [replica for replica in up if replica.is_isolated]
    for replica in empty_for_suspects(up, num_waiting):
        assert not replica.is_isolated and not replica.num_running


def test_the_replica_that_is_emptied_becomes_empty():
    """Work goes on and others get more; the one that is emptied has ever less to do, or another one is empty first."""
    up = [FakeReplica(work=work, num_running=work) for work in (3, 2, 4)]
    for _ in range(20):
        if empty_for_suspects(up, 1):
            break
        for replica in not_reserved(up, 1):
            replica.work, replica.num_running = replica.work + 1, replica.num_running + 1
        for replica in up:
            replica.work, replica.num_running = max(0, replica.work - 1), max(0, replica.num_running - 1)
    assert empty_for_suspects(up, 1)


class TestBlame:
    def test_a_crash_alone_after_a_crash_in_a_crowd_is_blame(self):
        evidence = Evidence()
        assert not evidence.add(is_crash=True, was_alone=False, had_started=True)
        assert evidence.is_suspect
        assert evidence.add(is_crash=True, was_alone=True, had_started=True)

    def test_crashes_in_a_crowd_never_are(self):
        evidence = Evidence()
        assert not any(evidence.add(is_crash=True, was_alone=False, had_started=True) for _ in range(15))

    def test_who_only_waited_is_a_suspect_at_the_second_loss(self):
        evidence = Evidence()
        evidence.add(is_crash=True, was_alone=False, had_started=False)
        assert not evidence.is_suspect
        evidence.add(is_crash=True, was_alone=False, had_started=False)
        assert evidence.is_suspect

    def test_having_waited_on_a_crashed_replica_does_not_count(self):
        evidence = Evidence()
        evidence.add(is_crash=True, was_alone=False, had_started=False)
        assert not evidence.add(is_crash=True, was_alone=True, had_started=True)

    def test_alone_and_never_begun_takes_three(self):
        """The damage may be that of the one before it, who has hung up."""
        evidence = Evidence()
        assert [evidence.add(is_crash=True, was_alone=True, had_started=False) for _ in range(3)] == [False, False, True]

    def test_kills_from_outside_count_alone_only_and_take_three(self):
        evidence = Evidence()
        assert not any(evidence.add(is_crash=False, was_alone=False, had_started=True) for _ in range(10))
        assert [evidence.add(is_crash=False, was_alone=True, had_started=True) for _ in range(3)] == [False, False, True]

    def test_a_kill_in_a_crowd_makes_no_suspects_and_a_second_one_does(self):
        evidence = Evidence()
        evidence.add(is_crash=False, was_alone=False, had_started=True)
        assert not evidence.is_suspect
        evidence.add(is_crash=False, was_alone=False, had_started=True)
        assert evidence.is_suspect
