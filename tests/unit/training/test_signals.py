"""Signals that would end the process are collected; those that somebody handles or ignores are left alone."""

import os
import signal

import pytest

from metatokens.training.signals import ALWAYS, UNLESS_HANDLED, collect_stop_signals


@pytest.mark.parametrize("number", [*ALWAYS, *UNLESS_HANDLED])
def test_a_signal_that_would_end_the_process_is_collected_once(number: signal.Signals):
    own = signal.getsignal(number)
    with collect_stop_signals() as received:
        os.kill(os.getpid(), number)
        assert received == [number]
        assert signal.getsignal(number) is own  # a second one acts at once
    assert signal.getsignal(number) is own


def test_a_signal_that_is_ignored_stays_ignored_as_under_nohup():
    own = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with collect_stop_signals() as received:
            os.kill(os.getpid(), signal.SIGHUP)
        assert received == []
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, own)
