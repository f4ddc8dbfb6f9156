"""Makes short-lived worker processes for kill tests: `python -m tests.attached.nursery SOCKET DEADLINE_S`.

Everything is imported once, and each worker is a fork that attaches by itself: a thousand take a minute. Nothing is
attached before the fork.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from itertools import count
from typing import Any

import kvstore
from kvstore.pool import HandOver
from kvstore.spec import Shard
from kvstore.testing.specs import check_lease, hybrid, put_all, put_states, put_tokens
from tests.attached.prompts import JOINT_DEADLINE_S, joint_prompt, prompt_of

DEADLINE_S = 60.0


def say(**answer: Any) -> None:
    os.write(1, json.dumps(answer).encode() + b"\n")


def work(store: kvstore.Store, generator: random.Random) -> None:
    """One thing that an engine's worker does, all of it or only a part."""
    ids = prompt_of(generator)
    prompt = store.prompt(ids)
    what = generator.randrange(6)
    try:
        if what < 3:
            with store.write(prompt) as writer:
                put_all(writer)
                writer.commit(handover=HandOver(7, b"logits") if what == 2 else None)
        elif what == 3:
            with store.write(prompt) as writer:
                half = store.spec.block_tokens
                put_tokens(writer, 0, half)
                writer.commit(half)
                put_tokens(writer, half, len(ids))
                if generator.random() < 0.5:
                    put_states(writer, len(ids))
                    writer.commit()
        else:
            match = store.match([*ids, 0])
            if match:
                with store.read(match) as lease:
                    check_lease(lease, store.prompt(ids[: lease.tokens]))
                    if what == 5 and lease.tokens < len(ids):
                        with store.write(prompt, resume=lease) as writer:
                            put_all(writer, start=lease.tokens)
                            writer.commit()
    except (kvstore.errors.PoolError, kvstore.errors.LeaseGoneError):
        return  # full for the moment, or evicted meanwhile


def live(path: str, seed: int, joint: list[Any] | None) -> None:
    """A worker's life; it ends by a kill, or with the first error that it says."""
    with kvstore.attach(path, deadline_s=DEADLINE_S) as store:
        say(ok=os.getpid())
        try:
            if joint is None:
                generator = random.Random(seed)
                while True:
                    work(store, generator)
            name, rank, parties = joint
            for attempt in count():
                ids, shard = joint_prompt(seed, attempt), Shard(rank, parties)
                with store.write(ids, shard=shard, joint=f"{name}-{attempt}") as writer:
                    put_all(writer)
                    writer.commit(deadline_s=JOINT_DEADLINE_S)
        except (kvstore.KVStoreError, AssertionError) as error:
            say(error=type(error).__name__, message=str(error))


def reach(path: str, stage: str, ids: list[int], salt: str, shard: list[int]) -> None:
    """Attach, come to a point in a worker's life and stay there until killed."""
    store = kvstore.attach(path, deadline_s=DEADLINE_S)
    say(ok=os.getpid())
    kept: list[object] = []
    try:
        if stage == "lease":
            match = store.match([*ids, 0], salt=salt.encode(), shard=Shard(*shard))
            kept.append(store.read(match) if match else None)
            say(ok=match.tokens)
        else:
            # Without states: a writer that will never commit is not to be waited for by others.
            writer = store.write(ids, salt=salt.encode(), shard=Shard(*shard), resume_at=())
            kept.append(writer)
            if stage != "reserve":
                put_tokens(writer, 0, len(ids))
            if stage == "commit":
                writer.commit()
            say(ok=writer.size_bytes)
    except kvstore.KVStoreError as error:
        say(error=type(error).__name__, message=str(error))
    signal.pause()


def warm_up() -> None:
    """Compute what every worker needs, before any is made: it lives for some hundredths of a second."""
    generator = random.Random(0)
    with kvstore.open(hybrid(16), dram="4MiB") as store:
        for _ in range(50):
            work(store, generator)
        for rank in range(2):
            with store.write(joint_prompt(0, 0), shard=Shard(rank, 2)) as writer:
                put_all(writer)


def main() -> None:
    warm_up()
    say(ok=os.getpid())
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "reap":
            os.waitpid(command["pid"], 0)
            say(ok=None)
        elif os.fork() == 0:
            try:
                if command.pop("do") == "reach":
                    reach(**command)
                else:
                    live(sys.argv[1], command["seed"], command.get("joint"))
            finally:
                os._exit(0)


if __name__ == "__main__":
    main()
