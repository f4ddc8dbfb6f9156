"""Processes that are there before threads are, and become the owner of a store when they are told to: to be killed."""

import json
import os
import signal
import sys
import time


class Spare:
    """A child that waits for settings, opens a store with them, and serves it until it is killed.

    Args:
        serve: what it does with the settings, in the child; it returns what keeps the store open.
    """

    def __init__(self, serve) -> None:
        order, self._order = os.pipe()
        self._said, say = os.pipe()
        self.process = os.fork()
        if self.process:
            os.close(order)
            os.close(say)
            return
        os.close(self._order)
        try:
            with os.fdopen(order) as orders:
                settings = orders.readline()
            if settings:
                _kept = serve(json.loads(settings))
                os.write(say, b"serves")
                time.sleep(3600)
        except BaseException as error:
            print(f"spare process: {error!r}", file=sys.stderr, flush=True)
        finally:
            os._exit(1)

    def serve(self, settings: dict) -> None:
        """Returns once the store is open."""
        os.write(self._order, json.dumps(settings).encode() + b"\n")
        if os.read(self._said, 16) != b"serves":
            raise RuntimeError("the spare process could not open the store")

    def kill(self) -> None:
        """At once, as a crash would. Idempotent."""
        if self.process:
            os.kill(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
            os.close(self._order)
            os.close(self._said)
            self.process = 0
