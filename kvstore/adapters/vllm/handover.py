"""Prefill on one instance, decode on another: what `kv_transfer_params` of a request says, and what is answered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvstore.errors import TransferError
from kvstore.limits import PROMPT_TOKENS_MAX

if TYPE_CHECKING:
    from collections.abc import Mapping

KEY = "kvstore"
"""Where a hand-over's own parameters stand in `kv_transfer_params`."""


@dataclass(frozen=True)
class Source:
    """For a decode instance: who prefilled the request.

    Attributes:
        address: where its cache can be fetched.
        tokens: how much was prefilled.
        is_pushed: it is on its way here already.
    """

    address: str
    tokens: int
    is_pushed: bool = False


@dataclass(frozen=True)
class Target:
    """For a prefill instance: another one will decode on.

    Attributes:
        send_to: where to send what is computed, as it is computed; empty: the other one fetches.
    """

    send_to: str = ""


def read_params(params: Mapping[str, Any] | None, peers: tuple[str, ...]) -> Source | Target | None:
    """What a request's `kv_transfer_params` ask for; None if nothing of this connector.

    Args:
        peers: whom the operator allows to exchange with: addresses, or beginnings of such that end in `*`. The
            parameters come with a request, so from outside.

    Raises:
        TransferError: they are malformed, or name somebody else.
    """
    if not params:
        return None
    if not isinstance(params, dict):
        raise TransferError(f"kv_transfer_params is {type(params).__name__}, not a table")
    if params.get("do_remote_prefill"):
        told = params.get(KEY)
        if not isinstance(told, dict):
            raise TransferError(f"do_remote_prefill without {KEY!r}: pass on what the prefill instance answered")
        address = _address(told.get("address", ""), peers)
        tokens = told.get("tokens")
        if type(tokens) is not int or not 0 < tokens <= PROMPT_TOKENS_MAX:
            raise TransferError(f"{KEY}.tokens is {tokens!r}, not the number of tokens that were prefilled")
        return Source(address, tokens, told.get("is_pushed") is True)
    if params.get("do_remote_decode"):
        send_to = params.get("send_to") or ""
        return Target(_address(send_to, peers) if send_to else "")
    return None


def answer(address: str, tokens: int, *, is_pushed: bool) -> dict[str, Any]:
    """What a prefill instance returns with its output, for the request to the decode instance."""
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        KEY: {"address": address, "tokens": tokens, "is_pushed": is_pushed},
    }


def is_peer(address: str, peers: tuple[str, ...]) -> bool:
    """Whether the operator allows an address."""
    return any(address.startswith(peer[:-1]) if peer.endswith("*") else address == peer for peer in peers)


def _address(address: object, peers: tuple[str, ...]) -> str:
    if not isinstance(address, str) or not address:
        raise TransferError("the other instance's address is missing; it is told, such as 'tcp://10.0.0.7:7400'")
    if not is_peer(address, peers):
        allowed = ", ".join(peers) or "none"
        raise TransferError(
            f"{address[:100]!r} is no peer of this instance (allowed: {allowed}); add it to peers in "
            "kv_connector_extra_config if it is one of yours"
        )
    return address
