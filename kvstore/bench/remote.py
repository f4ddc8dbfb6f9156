"""The receiving machine of a run over two: one listens, the other has its hands there.

Messages are those of `kvstore.bench.channel`. Whoever reaches the port may run benchmarks there: it starts sides that
this version knows, with bytes and numbers from the message, and nothing else.
"""

from __future__ import annotations

import ipaddress
import socket
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from kvstore.bench.channel import Channel
from kvstore.bench.hands import OPEN_S, Facts, Handle, Hands, LocalHands
from kvstore.bench.load import Load
from kvstore.bench.sides.choice import side_named
from kvstore.clock import Deadline
from kvstore.errors import AddressError, BenchmarkError, DeadlineError, PeerGoneError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore.bench.sides.side import Told

PROTOCOL = 1
CONNECT_S = 10.0
ANSWER_S = 30.0
PINGS = 5
IDLE_S = 600.0
DEADLINE_S_MAX = 3600.0
MEMORY_SHARE_MAX = 0.75
"""Of the memory that is available: what one half may ask a listening machine for."""


def parse_address(address: str) -> tuple[str, int]:
    """Host and port of `tcp://host:port`.

    Raises:
        AddressError: it is not of that form.
    """
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError as error:
        raise AddressError(f"{address!r} is no address ({error}); write tcp://host:port") from error
    if parts.scheme != "tcp" or not parts.hostname or port is None or parts.path or parts.query:
        raise AddressError(f"{address!r} is no address; write tcp://host:port")
    return parts.hostname, port


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# The side that runs the benchmark


class RemoteHandle(Handle):
    def __init__(self, hands: RemoteHands, worker: int, told: Told) -> None:
        self._hands, self._worker = hands, worker
        self.told = told

    def ask(self, what: str, deadline_s: float, **more: Any) -> dict[str, Any]:
        message = {"do": "ask", "worker": self._worker, "what": what, "more": more, "deadline_s": deadline_s}
        return self._hands.ask(message, deadline_s + ANSWER_S)

    def pause(self) -> None:
        self._hands.ask({"do": "pause", "worker": self._worker}, ANSWER_S)

    def resume(self) -> None:
        self._hands.ask({"do": "resume", "worker": self._worker}, ANSWER_S)

    def close(self) -> None:
        self._hands.ask({"do": "close", "worker": self._worker}, ANSWER_S)


class RemoteHands(Hands):
    """A machine on which `kvstore bench transfer --listen` runs.

    Raises:
        BenchmarkError: nobody listens there, or it is no such program, or of another version.
        AddressError: the address is malformed.
    """

    def __init__(self, address: str) -> None:
        host, port = parse_address(address)
        self._address = address
        try:
            sock = socket.create_connection((host, port), CONNECT_S)
        except OSError as error:
            raise BenchmarkError(
                f"cannot reach {address} ({error.strerror or error}); start `kvstore bench transfer --listen "
                f"tcp://0.0.0.0:{port}` there, or correct the address or the firewall"
            ) from error
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.own_host: str = sock.getsockname()[0]
        self._channel = Channel(sock)
        try:
            hello = self.ask({"do": "hello", "protocol": PROTOCOL}, CONNECT_S)
            if hello.get("protocol") != PROTOCOL:
                raise BenchmarkError(
                    f"{address} speaks version {hello.get('protocol')} of the benchmark's protocol, not {PROTOCOL}; "
                    "run the same version of kvstore on both machines"
                )
        except BaseException:
            self._channel.close()
            raise

    def ask(self, message: dict[str, Any], deadline_s: float) -> dict[str, Any]:
        """Raises `BenchmarkError` for what went wrong there, or on the way."""
        deadline = Deadline.after(deadline_s)
        try:
            self._channel.send(message, deadline)
            answer = self._channel.receive(deadline)
        except DeadlineError as error:
            raise BenchmarkError(
                f"{self._address} did not answer within {deadline_s:g} s; is it `kvstore bench transfer --listen`, and "
                "not busy with another run?"
            ) from error
        except PeerGoneError as error:
            raise BenchmarkError(f"{self._address} has ended the connection; look at what it prints") from error
        if "error" in answer:
            raise BenchmarkError(str(answer["error"]))
        return answer

    def facts(self) -> Facts:
        return Facts.from_message(self.ask({"do": "facts"}, ANSWER_S))

    def round_trip_s(self) -> float:
        seconds = []
        for _ in range(PINGS):
            begin = time.perf_counter()
            self.ask({"do": "ping"}, ANSWER_S)
            seconds.append(time.perf_counter() - begin)
        return min(seconds)

    def open(self, side: str, half: str, load: Load) -> RemoteHandle:
        answer = self.ask({"do": "open", "side": side, "half": half, "load": load.to_message()}, OPEN_S + ANSWER_S)
        return RemoteHandle(self, int(answer["worker"]), answer["told"])

    def end_workers(self) -> None:
        self.ask({"do": "end_workers"}, ANSWER_S)

    def busy(self, count: int) -> None:
        self.ask({"do": "busy", "count": count}, ANSWER_S)

    def close(self) -> None:
        # The other end takes the end of the stream for the end of the run.
        self._channel.close()


# The side that listens


def listen(address: str, *, idle_s: float = IDLE_S, say: Callable[[str], None] = print) -> None:
    """Serve one run after the other, until none has come for `idle_s` seconds.

    Raises:
        AddressError: the address is malformed or in use.
    """
    host, port = parse_address(address)
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise AddressError(f"cannot listen on {address}: {error.strerror or error}") from error
    with listener:
        listener.settimeout(idle_s)
        bound = listener.getsockname()
        shown = f"[{bound[0]}]" if ":" in bound[0] else bound[0]
        say(f"listening on tcp://{shown}:{bound[1]}")
        if not is_loopback(bound[0]):
            say(
                "anyone who reaches this port can run benchmarks here, unencrypted and unauthenticated; use it on a "
                "network that you trust"
            )
        while True:
            try:
                sock, peer = listener.accept()
            except TimeoutError:
                say(f"nobody came for {idle_s:g} s; the end")
                return
            with sock, LocalHands() as hands:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                say(f"a run from {peer[0]}")
                reason = Session(Channel(sock), hands, own_host=sock.getsockname()[0]).run(idle_s)
                say(f"the run from {peer[0]} is over{reason}")


class Session:
    """One run, served on the machine that listens."""

    def __init__(self, channel: Channel, hands: LocalHands, *, own_host: str) -> None:
        self._channel, self._hands, self._own_host = channel, hands, own_host
        self._workers: list[Handle] = []

    def run(self, idle_s: float) -> str:
        """Answer until the other end is gone; why it ended, unless as it should."""
        try:
            while True:
                message = self._channel.receive(Deadline.after(idle_s))
                try:
                    answer = self._do(message)
                except (AttributeError, LookupError, TypeError, ValueError) as error:
                    answer = {"error": f"a message that makes no sense: {error!r}"}
                except (BenchmarkError, OSError) as error:
                    answer = {"error": str(error)}
                self._channel.send(answer, Deadline.after(ANSWER_S))
        except PeerGoneError:
            return ""
        except DeadlineError:
            return f": nothing was heard for {idle_s:g} s"
        except BenchmarkError as error:
            return f": {error}"

    def _do(self, message: dict[str, Any]) -> dict[str, Any]:
        what = message.get("do")
        if what == "hello":
            return {"protocol": PROTOCOL}
        if what == "ping":
            return {}
        if what == "facts":
            return self._hands.facts().to_message()
        if what == "open":
            return self._open(message)
        if what == "ask":
            deadline_s = min(float(message["deadline_s"]), DEADLINE_S_MAX)
            return self._workers[int(message["worker"])].ask(str(message["what"]), deadline_s, **message["more"])
        if what == "pause":
            self._workers[int(message["worker"])].pause()
        elif what == "resume":
            self._workers[int(message["worker"])].resume()
        elif what == "close":
            self._workers[int(message["worker"])].close()
        elif what == "end_workers":
            self._hands.end_workers()
            self._workers = []
        elif what == "busy":
            self._hands.busy(int(message["count"]))
        else:
            raise BenchmarkError(f"{what!r} is no message of this version of the benchmark")
        return {}

    def _open(self, message: dict[str, Any]) -> dict[str, Any]:
        load = Load.from_message({**message["load"], "host": self._own_host})
        needed = side_named(message["side"]).needs_bytes(load)
        available = self._hands.facts().available_bytes
        if needed > available * MEMORY_SHARE_MAX:
            raise BenchmarkError(f"{needed} bytes are asked for, {available} are available on the listening machine")
        handle = self._hands.open(str(message["side"]), str(message["half"]), load)
        self._workers.append(handle)
        return {"worker": len(self._workers) - 1, "told": handle.told}
