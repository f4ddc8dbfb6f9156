"""Every error kvstore raises, as one small tree under `KVStoreError`.

A message names the thing, the limit and the remedy. A cache that lost something is a miss, not an
error; a peer that is gone is a failed transfer with a reason.
"""

from __future__ import annotations


class KVStoreError(Exception):
    """Base of every error of this library.

    `retryable` says whether the same call may succeed later without any change by the caller.
    """

    retryable: bool = False


class SpecError(KVStoreError, ValueError):
    """A model spec cannot be built, or two specs that must agree do not."""


class UnsupportedModelError(SpecError):
    """A model, or one of its cache layers, cannot be cached; the message gives the reason."""


class TokenError(KVStoreError, ValueError):
    """Token ids are empty, negative, too large or too many; or another input of a prefix key is not allowed."""


class RecordError(KVStoreError, ValueError):
    """Bytes are not a record that this reader can use: truncated, foreign, oversized, inconsistent."""


class FormatVersionError(RecordError):
    """A record was written in a format version, codec chain or coverage that this reader refuses."""


class ChecksumError(RecordError):
    """Stored and computed checksums differ."""


class CodecError(KVStoreError, ValueError):
    """A codec is unknown, or cannot encode or decode what it was given."""


class PoolError(KVStoreError):
    """The pool refused a request."""


class PoolFullError(PoolError):
    """There is no room, and nothing more may be evicted. Nothing was changed."""

    retryable = True


class QuotaError(PoolFullError):
    """One salt has used up its quota, and nothing more of it may be evicted. Nothing was changed."""


class QuotaTooSmallError(QuotaError):
    """All that one write needs together is more than its salt's whole quota. Nothing was changed."""

    retryable = False


class PinLimitError(PoolError):
    """Pins keep as much from being evicted as they may, of the tier or of one salt's quota. Nothing was changed."""

    retryable = True


class RecordTooLargeError(PoolError, ValueError):
    """One record of the spec does not fit into the tier at all, or exceeds the format's limit."""


class WriteTooLargeError(PoolFullError):
    """All that one write needs together is more than the tier could ever hold. Nothing was changed."""

    retryable = False


class QuarantineFullError(PoolError):
    """Too much space waits for writers that were dropped while bytes were moving."""

    retryable = True


class ArenaError(PoolError):
    """The memory of a tier cannot be had: too little room for all of it, or its name belongs to another process."""


class ShelfRefusedError(PoolError):
    """A tier did not take the records that it was given; they stay where they were.

    Attributes:
        reason: why, in one of few words: a label for counters.
    """

    def __init__(self, reason: str, message: str | None = None) -> None:
        super().__init__(reason if message is None else message)
        self.reason = reason


class SsdDirectoryError(PoolError):
    """A directory of an SSD tier cannot be used: another owner, another model, a newer format, or not readable."""


class StaleSlotError(PoolError):
    """A descriptor names a slot generation that has been freed."""


class WriteError(KVStoreError, ValueError):
    """A writer was used wrongly: a range twice, outside, of the wrong shape or dtype, or incomplete."""


class LeaseError(KVStoreError):
    """A lease cannot be had or used."""


class LeaseGoneError(LeaseError):
    """The records of an old match have been evicted since; match again."""

    retryable = True


class LoadFailedError(LeaseGoneError):
    """Records could not be loaded from another tier: damaged there, not readable, or nothing came. Match again."""


class StoreClosedError(KVStoreError):
    """The store was closed, or belongs to the process that forked this one."""


class AttachError(KVStoreError):
    """A process could not attach to an owner, or an owner could not offer its pool to processes."""


class AttachProtocolError(AttachError):
    """An attached process or its owner sent something that their protocol does not allow; they parted."""


class OwnerGoneError(StoreClosedError):
    """The process that owns the pool died, stopped or closed it: what its arena holds is void. Attach again."""

    retryable = True


class JointCommitError(KVStoreError):
    """One party of a joint commit gave up, died or was late. Nothing became visible, everything was given back."""

    retryable = True


class ConfigError(KVStoreError, ValueError):
    """A node or store cannot be configured so: a setting that does not exist, of a wrong type or size, unsafe."""


class UnavailableError(KVStoreError):
    """Something asked for is not installed or not supported on this machine."""


class DeviceError(KVStoreError, RuntimeError):
    """A device failed, has too little memory, or was given what is not its own."""


class DeadlineError(KVStoreError, TimeoutError):
    """A wait reached its deadline."""

    retryable = True


class TransportError(KVStoreError, OSError):
    """A transport could not listen, connect or move bytes."""


class AddressError(TransportError, ValueError):
    """An address cannot be parsed, is already in use, or names no transport."""


class PeerGoneError(TransportError):
    """The peer closed the connection, died, or cannot be reached.

    Attributes:
        transfer: the id (boot epoch, counter) of the transfer that failed by it, to take it up again with
            (`kvstore.transfer.Sender.send`); None if it was none of this node's.
    """

    retryable = True
    transfer: tuple[int, int] | None = None


class TransferError(KVStoreError):
    """A transfer ended without a commit."""


class ProtocolError(TransferError):
    """The peer sent something that the protocol does not allow; the connection was closed."""


class PeerMismatchError(TransferError):
    """The peers differ in protocol version or model fingerprint; the message names both values."""


class TransferFullError(TransferError):
    """The receiver has no room for the whole transfer. Nothing was changed there."""

    retryable = True


class TransferTooLargeError(TransferFullError):
    """The transfer is more than the receiver could ever hold. Nothing was changed there."""

    retryable = False


class TransferAbortedError(TransferError):
    """One side gave the transfer up; the message carries its reason."""


class PeerClosingError(TransferAbortedError):
    """The receiver drains, closes or needed the space: send elsewhere at once, or there later."""

    retryable = True


class ProfileError(KVStoreError, ValueError):
    """A profile's numbers are impossible or contradict each other, or its file cannot be used."""


class DeploymentError(KVStoreError, ValueError):
    """Clusters, links or limits of a deployment are missing, contradict each other, or cannot serve anything."""


class ScenarioError(KVStoreError, ValueError):
    """A scenario's file cannot be used; the message names file and key."""


class PlanError(KVStoreError, ValueError):
    """A plan was asked for that cannot be: a threshold outside of the lengths, a search too large, an unstable load."""


class TraceError(KVStoreError, ValueError):
    """A trace of requests cannot be read, or has holes; the message names file and line."""


class SimulationError(KVStoreError):
    """A simulation cannot run, or went over one of its limits."""


class BenchmarkError(KVStoreError):
    """A benchmark cannot run as it was asked for: a case, an address, a peer, or too little memory."""
