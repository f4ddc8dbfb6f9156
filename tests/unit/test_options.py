"""Options of a store, a listener and a transfer: what is unknown or of another type is refused at once."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import pytest

import kvstore
from kvstore.errors import AttachError, KVStoreError, TransferError
from kvstore.store import Store, Writer, open_store
from kvstore.testing.specs import hybrid, put_all
from kvstore.transfer import Endpoint, Sender, send_lease, send_writer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SPEC = hybrid(16)
IDS = list(range(32))


@pytest.fixture
def store() -> Iterator[Store]:
    with open_store(SPEC, dram="1MiB") as store:
        with store.write(IDS) as writer:
            put_all(writer)
            writer.commit()
        yield store


@pytest.mark.parametrize(
    "function",
    [open_store, kvstore.attach, Store.listen, Store.send, Writer.send, Endpoint, Sender.send, send_lease, send_writer],
    ids=lambda function: function.__qualname__,
)
def test_every_option_has_a_name_and_a_type(function: Callable[..., Any]) -> None:
    parameters = [each for each in inspect.signature(function).parameters.values() if each.name != "self"]
    assert not [each.name for each in parameters if each.kind is inspect.Parameter.VAR_KEYWORD]
    assert not [each.name for each in parameters if each.annotation in (each.empty, "Any")]


def test_an_unknown_option_is_refused(store: Store) -> None:
    with pytest.raises(TypeError, match="drum"):
        open_store(SPEC, drum="1MiB")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="congestion"):
        store.listen("memory://options", congestion="cubic")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="prio"):
        store.send(store.match([*IDS, 1]), "memory://options", prio=1)  # type: ignore[call-arg]


def test_how_processes_attach_needs_a_socket() -> None:
    for options in ({"allow_uids": [1]}, {"silence_s": 1.0}, {"verify": True}):
        with pytest.raises(AttachError, match="socket="):
            open_store(SPEC, dram="1MiB", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transport": "cubic"}, "TransportOptions"),
        ({"total_deadline_s": "5"}, "total_deadline_s='5'"),
        ({"total_deadline_s": 0}, "total_deadline_s=0"),
        ({"total_deadline_s": float("nan")}, "total_deadline_s=nan"),
        ({"total_deadline_s": 1e6}, "3600 s"),
        ({"priority": "first"}, "priority='first'"),
        ({"priority": 256}, "255"),
        ({"handover": 7}, "HandOver"),
    ],
)
def test_an_option_of_a_transfer_out_of_its_limits(store: Store, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TransferError, match=message):
        store.send(store.match([*IDS, 1]), "memory://options", **options)
    assert store.pool.evict(store.prompt(IDS).path.key(0)) > 0, "the refused transfer still holds its lease"


@pytest.mark.parametrize("options", [{"transport": "cubic"}, {"settings": {"credit_bytes": 1}}])
def test_an_option_of_a_listener_of_another_type(store: Store, options: dict[str, Any]) -> None:
    with pytest.raises(TransferError, match="pass one, or None"):
        store.listen("memory://options", **options)


@pytest.mark.parametrize("address", [7400, None, "7400"])
def test_an_address_without_a_transport(store: Store, address: Any) -> None:
    with pytest.raises(KVStoreError, match="tcp://"):
        store.listen(address)
    with pytest.raises(KVStoreError, match="tcp://"):
        store.send(store.match([*IDS, 1]), address)
