"""Faults below the adapter, and what goes on while it works; in the engine's environment, never in the product.

A fault changes what a load copies, between the store's records and the engine's pages: the adapter does all it does.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import hashlib
import os
import signal
import time
from typing import Any

KINDS = ("zero_states", "zero_block", "other_block", "note_block", "noted_block", "same_tenant", "fail_layer")
FRAME_BYTES = 64 << 10


class Faults:
    """Switched on for a while; counts how often it changed something.

    `zero_states/3` spoils one load in three.
    """

    def __init__(self) -> None:
        import kvstore.adapters.vllm.scheduling as scheduling
        import kvstore.store.lease as lease
        import kvstore.store.paged as paged
        from kvstore.adapters.paged import PagedMapping
        from kvstore.adapters.vllm.registering import EnginePages
        from kvstore.errors import LoadFailedError

        self.kind = ""
        self.count = 0
        self._one_in = 1
        self._loads = 0
        self._is_on = True
        load = PagedMapping.load

        def load_then_count(mapping: Any, *arguments: Any, **options: Any) -> None:
            self._loads += 1
            self._is_on = self._loads % self._one_in == 0  # loads into pages come one after the other
            load(mapping, *arguments, **options)

        PagedMapping.load = load_then_count  # type: ignore[method-assign]
        self._blocks: dict[tuple[int, str], Any] = {}
        read_tokens, copy_to = paged._read_tokens, lease.LayerView.copy_to

        def tokens_then_fault(lease: Any, layer: int, views: Any, start: int, stop: int) -> None:
            read_tokens(lease, layer, views, start, stop)
            block = lease.spec.block_tokens
            if self.kind == "noted_block":
                for name, view in views.items():
                    kept = self._blocks.get((layer, name))
                    if kept is not None and stop - start >= 2 * block:
                        view[:, block : 2 * block] = kept
                        self.count += 1
            elif self.kind == "note_block" and stop - start >= 2 * block:
                for name, view in views.items():
                    self._blocks[layer, name] = copy.deepcopy(view[:, block : 2 * block])
                self.count += 1
            if self._is_on and self.kind in ("zero_block", "other_block") and stop - start >= 2 * block:
                for view in views.values():  # [rows, tokens, ...]
                    view[:, block : 2 * block] = 0 if self.kind == "zero_block" else view[:, :block]
                self.count += 1

        def copy_then_fault(view: Any, **options: Any) -> None:
            copy_to(view, **options)
            if self._is_on and self.kind == "zero_states":
                for name, array in options.items():
                    if name != "stream":
                        array[...] = 0
                        self.count += 1

        load_layer = EnginePages.load_layer

        def last_layer_fails(pages: Any, lease: Any, order: Any, name: str, *rest: Any) -> Any:
            if self.kind == "fail_layer" and name == pages.names[-1]:
                self.count += 1
                raise LoadFailedError("the test lets it fail")
            return load_layer(pages, lease, order, name, *rest)

        EnginePages.load_layer = last_layer_fails  # type: ignore[method-assign]
        identity_of = scheduling.Identities.of

        def of_one_tenant(identities: Any, request: Any) -> Any:
            identity = identity_of(identities, request)
            if self.kind != "same_tenant":
                return identity
            self.count += 1
            return dataclasses.replace(identity, salt=b"")

        scheduling.Identities.of = of_one_tenant  # type: ignore[method-assign]
        paged._read_tokens = tokens_then_fault
        lease.LayerView.copy_to = copy_then_fault

    def begin(self, kind: str) -> None:
        kind, _, one_in = kind.partition("/")
        if kind and kind not in KINDS:
            raise ValueError(f"no such fault: {kind}")
        self.kind, self.count, self._one_in = kind, 0, int(one_in or 1)

    def end(self) -> int:
        count, self.kind, self.count = self.count, "", 0
        return count


class Hooks:
    """Something that happens between the match and the load of a request: when pages were allocated for it."""

    def __init__(self, connector: Any) -> None:
        self.count = 0
        self._hook: dict[str, Any] | None = None
        self._stores: list[Any] = []
        allocated = connector.update_state_after_alloc

        def first_the_hook(request: Any, blocks: Any, num_external_tokens: int, *rest: Any, **options: Any) -> Any:
            if self._hook is not None and num_external_tokens:
                self._happen(list(request.prompt_token_ids))
            return allocated(request, blocks, num_external_tokens, *rest, **options)

        connector.update_state_after_alloc = first_the_hook

    def begin(self, hook: dict[str, Any] | None, stores: list[Any]) -> None:
        self._hook, self._stores, self.count = hook, stores, 0

    def end(self) -> int:
        self._hook = None
        return self.count

    def _happen(self, ids: list[int]) -> None:
        assert self._hook is not None
        for store in self._stores:
            before = store.statistics().evicted_records
            if self._hook["kind"] == "expire":
                store.expire(ids, after_tokens=0)
                assert not store.match(ids).tokens
            else:
                _fill(store)
            self.count += store.statistics().evicted_records > before


def _fill(store: Any) -> None:
    """Write prompts that nobody asks for until as much has been evicted as there is room for."""
    from kvstore.testing.specs import put_all

    tokens, written = 4 * store.spec.block_tokens, 0
    first = 1 << 20 | store.statistics().commits << 8  # ids that no model has, and other ones each time
    while written < 2 * store.statistics().capacity_bytes:
        with store.write([first] * tokens) as writer:
            put_all(writer)
            written += writer.size_bytes
            writer.commit()
        first += 1 << 8


def die_sending(frames: int) -> None:
    """Send pieces frame by frame, small ones, and be killed before a given one."""
    import kvstore.transfer.attachment as attachment

    send_pieces = attachment.send_pieces
    sent = 0

    def frame_or_end(*order: Any) -> Any:
        nonlocal sent
        if sent + 1 >= frames:
            os.kill(os.getpid(), signal.SIGKILL)
        stream, departures, epoch, counter, generation, _, unsent, connection, until_s, _, *rest = order
        done = send_pieces(
            stream, departures, epoch, counter, generation, FRAME_BYTES, unsent, connection, until_s, True, *rest
        )
        sent += done[0]
        return done[0], done[1], b"", done[3]

    attachment.send_pieces = frame_or_end


def note_stores() -> list[Any]:
    """A list that every store opened from here on is added to."""
    from kvstore.store import Store

    stores: list[Any] = []
    begin = Store.__init__

    def noted(store: Any, *arguments: Any, **options: Any) -> None:
        begin(store, *arguments, **options)
        stores.append(store)

    Store.__init__ = noted  # type: ignore[method-assign]
    return stores


def state_of(stores: list[Any], deadline_s: float) -> dict[str, Any]:
    """What the stores hold; waits for it to become nothing, since it may end a moment after its request."""
    stores = [store for store in stores if not store.is_closed]
    until = time.monotonic() + deadline_s
    while True:
        held = _held(stores)
        if not any(held.values()) or time.monotonic() > until:
            break
        time.sleep(0.02)
    names = (
        "matches",
        "hits",
        "commits",
        "aborts",
        "stored_records",
        "stored_bytes",
        "evicted_records",
        "damaged_records",
    )
    all_of_them = [store.statistics() for store in stores]
    totals = {name: sum(getattr(each, name) for each in all_of_them) for name in names}
    shelves = [shelf for each in all_of_them for shelf in getattr(each, "shelves", ())]
    totals["damaged_records"] += sum(shelf.damaged_records for shelf in shelves)
    return {"held": held, "stores": len(stores), **totals}


def _held(stores: list[Any]) -> dict[str, int]:
    from kvstore.store import Lease, Writer

    gc.collect()
    statistics = [store.statistics() for store in stores]
    things = gc.get_objects()
    return {
        "reserved_bytes": sum(each.reserved_bytes for each in statistics),
        "quarantined_bytes": sum(each.quarantined_bytes for each in statistics),
        "leases": sum(type(thing) is Lease and not thing._is_released for thing in things),
        "writers": sum(type(thing) is Writer and thing.transaction.is_open for thing in things),
    }


def save_by_layer(is_on: bool) -> int:
    """Have the workers of this process save layer by layer, or at the end of steps; how many there are."""
    from kvstore.adapters.vllm.working import Worker

    workers = [thing for thing in gc.get_objects() if type(thing) is Worker]
    for worker in workers:
        worker._saves_by_layer = is_on
    return len(workers)


def digests_of(store: Any, ids: list[int], salt: bytes) -> dict[str, str]:
    """A digest of all tensors at each resume point of a prompt, by its length."""
    match = store.match([*ids, 1], salt=salt)
    found = {}
    for candidate in match.candidates:
        digest = hashlib.sha256()
        with store.read(match.at(candidate.tokens)) as lease:
            for group in store.spec.groups:
                for layer in group.layers:
                    for tensor in group.tensors:
                        digest.update(lease.layer(layer).read(tensor.name).tobytes())
        found[str(candidate.tokens)] = digest.hexdigest()
    return found
