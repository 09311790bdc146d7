"""Sampling as an iterator: in step with who watches, and gone when nobody does."""

import threading

import pytest

from dci.app.stepwise import Steps, alternately


def counting(steps, seen=None):
    """A sampler that tells of its steps, and notes the ones that it has made."""

    def call(tell):
        for i in range(steps):
            if seen is not None:
                seen.append(i)
            tell({"i": i})
        return f"{steps} steps"

    return call


def test_steps_come_in_order_and_the_result_is_there_at_the_end():
    steps = Steps(counting(3))
    assert [step["i"] for step in steps] == [0, 1, 2]
    assert steps.result == "3 steps"
    assert next(steps, None) is None


def test_no_step_is_made_before_it_is_waited_for():
    seen = []
    steps = Steps(counting(5, seen))
    assert seen == []
    next(steps)
    assert seen == [0]
    steps.close()
    assert seen == [0]


def test_closing_ends_the_thread_whenever_it_happens():
    before = threading.active_count()
    for taken in range(4):
        steps = Steps(counting(3))
        for _ in range(taken):
            next(steps, None)
        steps.close()
        steps.close()
        assert threading.active_count() == before


def test_an_error_reaches_who_waits():
    def call(tell):
        tell({"i": 0})
        raise ValueError("no")

    steps = Steps(call)
    next(steps)
    with pytest.raises(ValueError, match="no"):
        next(steps)


def test_two_samplings_take_turns_and_the_longer_one_goes_on_alone():
    strands = Steps(counting(2)), Steps(counting(4))
    order = [(number, step["i"]) for number, step in alternately(*strands)]
    assert order == [(0, 0), (1, 0), (0, 1), (1, 1), (1, 2), (1, 3)]
    assert [strand.result for strand in strands] == ["2 steps", "4 steps"]


def test_leaving_both_ends_both():
    before = threading.active_count()
    taking = alternately(Steps(counting(9)), Steps(counting(9)))
    next(taking)
    taking.close()
    assert threading.active_count() == before
