"""HELLO: what both sides must agree on before anything else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvstore.errors import PeerMismatchError, ProtocolError, TransferError
from kvstore.limits import FRAME_PAYLOAD_BYTES_MAX, FRAME_PIECES_MAX
from kvstore.transfer.frames import PROTOCOL_VERSION
from kvstore.transfer.messages import Feature, Hello

if TYPE_CHECKING:
    from kvstore.abc import Connection
    from kvstore.spec import ModelSpec
    from kvstore.transfer.offer import Offer
    from kvstore.transfer.settings import TransferSettings


def make_hello(
    spec: ModelSpec, boot_epoch: int, settings: TransferSettings, connection: Connection, *, can_join: bool = False
) -> Hello:
    """This side's HELLO on a connection; `can_join`: whether further ones may carry pieces of a transfer."""
    return Hello(
        boot_epoch=boot_epoch,
        fingerprint=spec.fingerprint,
        model=spec.model,
        progress_deadline_ms=max(1, round(settings.progress_deadline_s * 1000)),
        features=(Feature.MATCH | Feature.SPARSE)
        | (Feature.GET if connection.supports_get else 0)
        | (Feature.JOIN | Feature.REJOIN if can_join else 0),
        frame_payload_bytes_max=FRAME_PAYLOAD_BYTES_MAX,
        frame_pieces_max=FRAME_PIECES_MAX,
        version_min=PROTOCOL_VERSION,
        version_max=PROTOCOL_VERSION,
    )


def check_hello(ours: Hello, theirs: Hello, peer_address: str) -> None:
    """Both sides check the same and come to the same answer.

    Raises:
        PeerMismatchError: no common protocol version, or another model; both values are named.
    """
    if theirs.version_max < ours.version_min or ours.version_max < theirs.version_min:
        raise PeerMismatchError(
            f"{peer_address} speaks protocol versions {theirs.version_min} to {theirs.version_max}, this side "
            f"{ours.version_min} to {ours.version_max}; use releases of kvstore that share a version"
        )
    if theirs.fingerprint != ours.fingerprint:
        raise PeerMismatchError(
            f"{peer_address} holds model {theirs.model!r} with fingerprint {theirs.fingerprint.hex()[:16]}, this side "
            f"{ours.model!r} with {ours.fingerprint.hex()[:16]}; their caches are not interchangeable: both nodes need "
            "the same model spec (weights, block size, dtypes)"
        )


def check_takes(offer: Offer, theirs: Hello, peer_address: str) -> None:
    """Before an offer is sent: whether the peer can take what it brings.

    Raises:
        TransferError: layers hold only some tokens, which the peer does not know of.
    """
    if offer.path.sparse and not theirs.features & Feature.SPARSE:
        raise TransferError(
            f"{peer_address} does not take sparse records, whose layers hold only some tokens; use a release of "
            "kvstore there that does, or send a resume point that holds every token"
        )


def check_may_offer(offer: Offer, theirs: Hello | None) -> None:
    """After an offer has come: whether the peer said that it would make such offers.

    Raises:
        ProtocolError: it did not.
    """
    if offer.path.sparse and (theirs is None or not theirs.features & Feature.SPARSE):
        raise ProtocolError("OFFER has a coverage table, which the sender's HELLO did not announce")


def may_join(ours: Hello, theirs: Hello) -> bool:
    """Whether further connections may carry pieces of a transfer."""
    return bool(ours.features & theirs.features & Feature.JOIN)


def may_rejoin(ours: Hello, theirs: Hello) -> bool:
    """Whether a further connection may outlive its attachment, to join another one."""
    return bool(ours.features & theirs.features & Feature.REJOIN)


def may_match(ours: Hello, theirs: Hello) -> bool:
    """Whether one side may ask the other what it has."""
    return bool(ours.features & theirs.features & Feature.MATCH)


def uses_get(ours: Hello, theirs: Hello) -> bool:
    """Whether pieces are got from exposed memory instead of being sent."""
    return bool(ours.features & theirs.features & Feature.GET)
