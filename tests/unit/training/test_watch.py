"""The watch names the process that hangs or has died, from what each has left in the store."""

import time
from collections.abc import Iterator

import pytest
from torch.distributed import TCPStore

from metatokens.training import watch
from metatokens.training.watch import PeerWatch


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[PeerWatch]]:
    """The watches of three processes, all in this one, which are at the same place."""
    monkeypatch.setattr(watch, "_BEAT_SECONDS", 0.02)
    monkeypatch.setattr(watch, "_SILENCE_SECONDS", 1.0)
    store = TCPStore("127.0.0.1", 0, 1, is_master=True)
    peers = [PeerWatch(store, rank, 3) for rank in range(3)]
    for peer in peers:
        peer.start()
        peer.enter("step 1", 600)
    end = time.monotonic() + 60
    while {place for _, _, place in peers[0]._read().values()} != {"step 1"}:  # until each has told where it is
        assert time.monotonic() < end
        time.sleep(0.02)
    yield peers
    for peer in peers:
        peer.stop()


def test_a_process_that_lives_but_does_not_arrive_hangs(peers: list[PeerWatch]):
    for peer in (peers[0], peers[2]):
        peer.enter("step 2", 600)
    error = peers[0].explain()
    assert str(error).startswith("step 2: rank 1 hangs in step 1; the same command continues from the last checkpoint")
    assert not error.is_repeated
    assert peers[2].explain().is_repeated  # one process tells


def test_a_process_that_does_not_arrive_at_a_meeting_outside_of_a_step_hangs_too(peers: list[PeerWatch]):
    for peer in peers[:2]:
        peer.arrive()
    assert "rank 2 hangs in step 1" in str(peers[0].explain())


def test_a_process_without_a_heartbeat_has_died_and_the_next_one_tells(peers: list[PeerWatch]):
    peers[0].stop()
    peers[0]._thread.join()  # a beat that has begun ends first
    error = peers[1].explain()
    assert "rank 0 died or does not run (last seen in step 1)" in str(error)
    assert not error.is_repeated


def test_where_all_wait_for_one_another_nobody_is_blamed(peers: list[PeerWatch]):
    assert "none says which hangs" in str(peers[0].explain())
