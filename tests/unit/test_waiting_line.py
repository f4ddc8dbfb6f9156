"""The line of offers that wait for space: `kvstore.transfer.waiting`."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import Any, cast

from kvstore.clock import Deadline
from kvstore.transfer.frames import TransferId
from kvstore.transfer.waiting import Waiting, WaitingLine

_counter = count(1)


@dataclass
class Offered:
    """What the line looks at in an offer."""

    priority: int


def join(line: WaitingLine, priority: int, deadline_s: float = 60.0, epoch: int = 1) -> Waiting | None:
    offer = cast("Any", Offered(priority))
    return line.join(TransferId(epoch, next(_counter)), offer, "peer", Deadline.after(deadline_s))


def joined(line: WaitingLine, priority: int, deadline_s: float = 60.0, epoch: int = 1) -> Waiting:
    waiting = join(line, priority, deadline_s, epoch)
    assert waiting is not None
    return waiting


def try_once(line: WaitingLine, waiting: Waiting) -> bool:
    """A try that finds no space."""
    has_tried = line.begin_try(waiting)
    line.end_try(waiting)
    return has_tried


def test_the_most_urgent_goes_first_then_who_came_first() -> None:
    line = WaitingLine(10)
    low, first, second, urgent = (joined(line, priority) for priority in (9, 5, 5, 0))
    for expected in (urgent, first, second, low):
        assert [waiting for waiting in (low, second, first, urgent) if try_once(line, waiting)] == [expected]
        line.leave(expected)
    assert len(line) == 0


def test_one_tries_at_a_time() -> None:
    line = WaitingLine(10)
    first, second = joined(line, 5), joined(line, 5)
    assert line.begin_try(first)
    assert not line.begin_try(second)
    line.end_try(first)
    assert line.begin_try(second)


def test_what_does_not_fit_lets_equals_try_and_nobody_less_urgent() -> None:
    line = WaitingLine(10)
    large, small, low = joined(line, 5), joined(line, 5), joined(line, 6)
    assert try_once(line, large)
    assert try_once(line, small)
    assert not try_once(line, low)
    assert not any(try_once(line, waiting) for waiting in (large, small, low))
    # More space: again in their order.
    line.note_change()
    assert not try_once(line, small)
    assert try_once(line, large)
    assert try_once(line, small)


def test_everybody_tries_once_more_at_its_deadline() -> None:
    line = WaitingLine(10)
    urgent, low = joined(line, 0), joined(line, 9, deadline_s=0.0)
    assert try_once(line, low)
    assert try_once(line, urgent)


def test_time_alone_is_a_change() -> None:
    line = WaitingLine(10)
    waiting = joined(line, 0)
    assert try_once(line, waiting)
    line.note_time(60.0)
    assert not try_once(line, waiting)
    line.note_time(0.0)
    assert try_once(line, waiting)


def test_a_full_line_gives_the_last_place_to_who_is_more_urgent() -> None:
    line = WaitingLine(2)
    first, last = joined(line, 5), joined(line, 7)
    assert join(line, 7) is None
    urgent = joined(line, 0)
    assert last.is_ousted
    assert not first.is_ousted
    assert len(line) == 2
    assert line.find(last.transfer) is None
    assert line.find(urgent.transfer) is urgent


def test_who_tries_keeps_its_place() -> None:
    line = WaitingLine(2)
    first, last = joined(line, 5), joined(line, 7)
    assert try_once(line, first)
    line.leave(first)
    assert line.begin_try(last)
    between = joined(line, 6)
    joined(line, 0)
    assert between.is_ousted
    assert not last.is_ousted


def test_offers_are_counted_by_peer() -> None:
    line = WaitingLine(10)
    joined(line, 1, epoch=1)
    joined(line, 1, epoch=2)
    joined(line, 1, epoch=2)
    assert (line.count_of_peer(1), line.count_of_peer(2), line.count_of_peer(3)) == (1, 2, 0)
