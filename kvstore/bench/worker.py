"""The process of one half of one side: `python -m kvstore.bench.worker DESCRIPTOR`.

It does what the messages on that socket say, answers each, and ends with the socket. What programs print goes to
standard output and error, which nobody parses.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from typing import TYPE_CHECKING, Any

from kvstore.bench.channel import Channel
from kvstore.bench.load import Load
from kvstore.bench.sides.choice import side_named
from kvstore.bench.sides.side import ReceivingHalf, SendingHalf
from kvstore.clock import Deadline
from kvstore.errors import BenchmarkError, DeadlineError, PeerGoneError

if TYPE_CHECKING:
    from kvstore.bench.sides.side import Half

RECEIVE = "receive"
SEND = "send"
LISTEN_S = 60.0
"""A wait that is simply begun again: whoever started this process decides how long it lives."""
ANSWER_S = 10.0


class Worker:
    """Does one message at a time."""

    def __init__(self) -> None:
        self.half: Half | None = None
        self._batches = 1
        self._cpu_s = 0.0

    def do(self, message: dict[str, Any]) -> dict[str, Any]:
        """The answer to a message.

        Raises:
            BenchmarkError: it makes no sense; otherwise whatever the side raises.
        """
        what = message.get("do")
        if what == "open":
            return self._open(message)
        half = self.half
        if half is None:
            raise BenchmarkError(f"{what!r} before open")
        if what == "hear":
            half.hear(message["told"])
        elif what == "connect":
            half.connect()
        elif what == "digest":
            return {"digest": half.digest()}
        elif what == "congestion":
            return {"congestion": half.congestion()}
        elif what == "send" and isinstance(half, SendingHalf):
            cpu_s = half.cpu_s()
            seconds = [half.send(batch) for batch in range(self._batches)]
            return {"seconds": seconds, "cpu_s": half.cpu_s() - cpu_s}
        elif what == "clear" and isinstance(half, ReceivingHalf):
            half.clear()
        elif what == "begin_round":
            self._cpu_s = half.cpu_s()
        elif what == "end_round" and isinstance(half, ReceivingHalf):
            half.finish_round()
            return {"cpu_s": half.cpu_s() - self._cpu_s}
        elif what == "make_room" and isinstance(half, ReceivingHalf):
            half.make_room()
        else:
            raise BenchmarkError(f"this half does not do {what!r}")
        return {}

    def _open(self, message: dict[str, Any]) -> dict[str, Any]:
        side, load, tools = side_named(message.get("side")), Load.from_message(message.get("load")), message["tools"]
        self._batches = load.batches
        self.half = side.receiving(load, tools) if message.get("half") == RECEIVE else side.sending(load, tools)
        return {"told": self.half.tell()}


def serve(channel: Channel) -> None:
    """Answer until the other end is gone."""
    worker = Worker()
    try:
        while True:
            try:
                message = channel.receive(Deadline.after(LISTEN_S))
            except DeadlineError:
                continue
            try:
                answer = worker.do(message)
            except Exception as error:
                # Third parties' programs raise anything; whatever it is ends this side and not the run.
                traceback.print_exc()
                answer = {"error": str(error) or type(error).__name__}
            channel.send(answer, Deadline.after(ANSWER_S))
    except PeerGoneError:
        pass  # the run is over
    finally:
        if worker.half is not None:
            worker.half.close()


def main() -> None:
    status = 1
    try:
        with socket.socket(fileno=int(sys.argv[1])) as sock:
            serve(Channel(sock))
        status = 0
    finally:
        # Engines of third parties have threads that do not end.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
