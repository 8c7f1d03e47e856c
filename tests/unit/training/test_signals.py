"""Signals that ask to stop are collected, and the process's own handlers are put back afterwards."""

import os
import signal
import threading
import time

import pytest

from metatokens.errors import Preempted
from metatokens.training import signals
from metatokens.training.signals import ALWAYS, UNLESS_HANDLED, StopRequest, collect_stop_signals


@pytest.mark.parametrize("number", [*ALWAYS, *UNLESS_HANDLED])
def test_a_signal_that_would_end_the_process_is_a_request_to_stop(number: signal.Signals):
    own = signal.getsignal(number)
    with collect_stop_signals() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop.cause == number.name
    assert signal.getsignal(number) is own


def test_a_signal_that_is_ignored_stays_ignored_as_under_nohup():
    own = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with collect_stop_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop
    finally:
        signal.signal(signal.SIGHUP, own)


def test_a_repeat_is_ignored_for_a_while_and_then_takes_its_usual_effect(monkeypatch: pytest.MonkeyPatch):
    with collect_stop_signals() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop
        monkeypatch.setattr(signals, "GRACE_SECONDS_OF_SIGINT", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def interrupt_at_once(stop: StopRequest) -> None:
    with stop.at_once():
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("went on")


def test_where_nothing_would_be_lost_a_signal_ends_the_work_at_once():
    with collect_stop_signals() as stop:
        with pytest.raises(Preempted, match="stopped by SIGTERM; the same command"):
            interrupt_at_once(stop)
        with pytest.raises(Preempted):  # the request stands, so a second block does not begin
            interrupt_at_once(stop)


def test_a_time_limit_is_a_request_to_stop():
    with collect_stop_signals(stop_after=0.05) as stop:
        assert not stop
        time.sleep(0.3)
        assert stop.cause == "--stop-after"
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_outside_the_main_thread_the_handlers_stay_as_they_are():
    seen: list[StopRequest] = []

    def work() -> None:
        with collect_stop_signals(stop_after=1.0) as stop:
            seen.append(stop)

    own = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is own
    assert not seen[0]
