"""What vLLM's scheduler hands to a connector, in small: requests, outputs, and a store that may be gone."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from kvstore.adapters.vllm.opening import SchedulerStore
from kvstore.testing.specs import put_all

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvstore.store import Store


@dataclass
class FakeRequest:
    """The attributes of vLLM's `Request` that the connector reads."""

    request_id: str
    prompt_token_ids: list[int] | None
    output: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    prompt_embeds: Any = None
    lora_request: Any = None
    cache_salt: str | None = None
    mm_features: list[Any] = field(default_factory=list)
    resumable: bool = False
    skip_reading_prefix_cache: bool = False
    kv_transfer_params: Any = None

    @property
    def all_token_ids(self) -> list[int]:
        return [*(self.prompt_token_ids or ()), *self.output]

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids or ())


@dataclass
class FakeBlocks:
    """The tables of all requests, as `KVConnectorBlockState` resolves them."""

    tables: dict[str, tuple[list[int], ...]]

    def get_block_ids(self, request_id: str) -> tuple[list[int], ...]:
        return self.tables[request_id]


def step(
    scheduled: dict[str, int] | None = None,
    *,
    tables: dict[str, tuple[list[int], ...]] | None = None,
    preempted: Sequence[str] = (),
) -> Any:
    """A `SchedulerOutput`. Requests without tables have one of a page."""
    every = {request_id: ([1],) for request_id in scheduled or {}}
    return SimpleNamespace(
        num_scheduled_tokens=scheduled or {},
        preempted_req_ids=set(preempted),
        kv_connector_block_state=FakeBlocks({**every, **(tables or {})}),
    )


class FakeSchedulerStore(SchedulerStore):
    """A store of this process that can be taken away."""

    def __init__(self, store: Store, *, is_local: bool = True, address: str = "") -> None:
        self.store: Store | None = store
        self.socket = "/run/test.sock"
        self.address = address
        self.is_local = is_local
        self.errors: list[BaseException] = []

    def get(self) -> Store | None:
        return self.store

    def failed(self, store: Store, error: BaseException) -> None:
        self.errors.append(error)

    def clear(self) -> bool:
        return False

    def close(self) -> None:
        self.store = None


def keep(store: Store, ids: Sequence[int], **identity: Any) -> None:
    """Write a prompt as a whole, with a resume point at its end."""
    with store.write(list(ids), **identity) as writer:
        put_all(writer)
        writer.commit()
