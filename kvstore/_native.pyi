"""The parts of kvstore that touch every byte or every record: arena, checksums, strided copies and sockets."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

__version__: str

_PackedPath = tuple[bytes, int, bytes, bytes | None, bytes]
_PackedNodes = tuple[bytes, bytes, NDArray[np.uint64], bytes, list[tuple[bytes, bytes]]]

class Arena:
    """Slots in shared memory, for `kvstore.tiers.ArenaTier`, which documents what they mean. Any thread may call.

    A slot is a tuple (index, generation, size in bytes); several are rows of these, `[n, 3]`. The GIL is released
    while bytes move or memory is cleared.

    Raises:
        ArenaError: there is too little memory, or another process owns the name.
    """

    def __init__(
        self,
        capacity_bytes: int,
        largest_slot_bytes: int,
        slot_sizes_bytes: list[int],
        directory: str,
        name: str,
    ) -> None: ...
    def allocate(self, sizes_bytes: list[int]) -> bytes | None:
        """The rows of a slot for each size, or None and nothing taken."""

    def would_fit(self, sizes_bytes: list[int], freeing: NDArray[np.uint64]) -> bool:
        """Whether `allocate` would succeed if these live slots were freed first."""

    def fits_when_empty(self, sizes_bytes: list[int]) -> bool:
        """Whether `allocate` would succeed if nothing were allocated."""

    def free(self, slots: NDArray[np.uint64]) -> None:
        """Frees in order, up to the first that is stale: StaleSlotError."""

    def pin(self, slots: NDArray[np.uint64]) -> None:
        """Pins all or, with StaleSlotError, none."""

    def unpin(self, slots: NDArray[np.uint64]) -> None:
        """Ends one pin of each, up to the first that has none: StaleSlotError."""

    def location(self, slot: tuple[int, int, int], must_be_pinned: bool) -> int:
        """Offset of a live slot in the mapping."""

    def locations(self, slots: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Offsets of pinned slots, shape [n]."""

    def write(self, slot: tuple[int, int, int], data: Buffer, offset: int) -> None:
        """Copies into a live slot; ValueError when the range lies outside."""

    def read(self, slot: tuple[int, int, int], into: Buffer, offset: int) -> None:
        """Copies out of a live slot; ValueError when the range lies outside."""

    def memory(self) -> memoryview:
        """The whole mapping, which its views keep alive also after `close`."""

    def statistics(self) -> dict[str, Any]:
        """Counters, and per class: slot bytes, slabs, live and quarantined slots, free places."""

    def check(self) -> None:
        """Raises when the tables disagree with each other."""

    def close(self) -> None:
        """Gives up name and descriptor; every slot becomes stale. Idempotent."""

    @property
    def used_bytes(self) -> int: ...
    @property
    def quarantined_bytes(self) -> int: ...
    @property
    def slab_bytes(self) -> int: ...
    @property
    def is_closed(self) -> bool: ...
    @property
    def descriptor(self) -> int: ...
    @property
    def path(self) -> str: ...
    @property
    def huge_pages(self) -> tuple[bool, str]: ...

def crc32c(data: Buffer | NDArray[Any], value: int = 0) -> int:
    """CRC32C (RFC 3720) of a C-contiguous buffer, continued from `value`.

    `crc32c(b, crc32c(a))` is the checksum of a followed by b. Any thread may call; the GIL is released for large
    buffers.

    Raises:
        TypeError: `data` has no buffer, or `value` is not an unsigned 32-bit integer.
        BufferError: the buffer is not contiguous.
    """

def crc32c_many(addresses: NDArray[np.uint64], sizes: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """CRC32C of each range of memory, shape [n]; any thread may call, the GIL is released.

    `addresses` (absolute) and `sizes` (bytes) are contiguous and of shape [n]. The caller keeps the memory alive and
    has checked that each range lies inside it.

    Raises:
        TypeError: not arrays of uint64.
        ValueError: the shapes differ or are not [n], or a range is null or wraps around.
    """

def copy_rows(plan: NDArray[np.uint64], *, threads: int = 1, streams: bool | None = None) -> None:
    """Copies rows of bytes by a contiguous plan of shape [n, 6]; any thread may call, the GIL is released.

    Columns: destination, source, rows, row_bytes, destination_stride, source_stride. Addresses are absolute, strides
    are bytes; row i goes from source + i * source_stride to destination + i * destination_stride. An entry whose
    strides both equal row_bytes is one copy. The whole plan is checked before a byte moves. The caller keeps the
    memory alive and has checked that each region lies inside it.

    Args:
        threads: at most so many, the caller's included, share the work, on threads of their own.
            With more than one, destinations must not overlap. 1 to `kvstore.limits.COPY_THREADS_MAX`.
        streams: store past the caches, for what is larger than they are. None decides by the plan's size; see
            `copy_stream_bytes` of `cpu_features`.

    Raises:
        TypeError: not an array of uint64.
        ValueError: the shape is not [n, 6], or an entry has a null address, a stride smaller than its row, a region
            past the end of the address space, or overlapping source and destination; or `threads` is out of range.
    """

def copy_rows_crc32c(plan: NDArray[np.uint64], *, threads: int = 1, streams: bool | None = None) -> None:
    """As `copy_rows`, by a plan of shape [n, 7] that also says where checksums go.

    Column 6 is the address of a uint32 of any alignment, or 0: it takes the CRC32C of the entry's bytes in the order of
    its rows, computed while they are copied. Consecutive entries with the same address make one piece, whose checksum
    runs on from entry to entry.

    Raises:
        TypeError, ValueError: as `copy_rows`.
    """

def crc32c_in_place(plan: NDArray[np.uint64], *, threads: int = 1) -> None:
    """Stores the CRC32C of ranges of memory by a contiguous plan of shape [n, 3]; the GIL is released.

    Columns: address, size in bytes, address of the uint32 of any alignment that takes the checksum. The caller keeps
    the memory alive. Any thread may call.

    Raises:
        TypeError: not an array of uint64.
        ValueError: the shape is not [n, 3], a range is null or wraps around, a checksum has no place, or `threads` is
            out of range.
    """

def addresses_of(buffers: Sequence[Buffer]) -> NDArray[np.uint64]:
    """Address of the first byte of each buffer, shape [n]. The caller keeps the buffers alive.

    Raises:
        TypeError: not a sequence of buffers.
        BufferError: a buffer is not contiguous.
    """

def frame_records(
    header_template: Buffer,
    record_class: NDArray[np.uint64],
    gaps: NDArray[np.uint64],
    addresses: NDArray[np.uint64],
    digests: Buffer,
    numbers: NDArray[np.uint64],
) -> None:
    """Writes the framing of records of one class where they lie; any thread may call, the GIL is released.

    The piece checksums of each record are in place. The caller keeps the memory alive and has checked that records of
    this class fit there.

    Args:
        header_template: the class's header with blank fields.
        record_class: shape [10]: offsets of the fields key, parent, grid, end_tokens, valid_tokens, cost_us and
            metadata_crc32c; checksum of the schema message; offset and bytes of the checksum column,
            with what lies behind it that the metadata checksum covers, too.
        gaps: offset and bytes of each gap of the body, shape [g, 2].
        addresses: of the records, shape [n].
        digests: n times 96 bytes: key, parent, grid.
        numbers: end_tokens, valid_tokens, cost_us, shape [n, 3]; what is too large for its field is cut to it.

    Raises:
        TypeError: another kind of array.
        ValueError: shapes that contradict each other, a field outside of the header, a null address.
    """

def intact_records(
    header_template: Buffer,
    record_class: NDArray[np.uint64],
    gaps: NDArray[np.uint64],
    pieces: NDArray[np.uint64],
    addresses: NDArray[np.uint64],
    digests: Buffer,
    numbers: NDArray[np.uint64],
    *,
    threads: int = 1,
) -> NDArray[np.bool_]:
    """Whether each record is byte for byte what `frame_records` would write, with zero gaps and sound pieces; [n].

    Any thread may call, the GIL is released. Arguments as for `frame_records`, and:

    Args:
        pieces: offset and bytes of each piece, in the order of the checksum column, shape [p, 2].
        threads: at most so many share the work, the caller's included.

    Raises:
        TypeError, ValueError: as `frame_records`, or more pieces than checksums.
    """

def cpu_features() -> dict[str, str | bool | int]:
    """What this CPU offers, which code paths are in use and, where there is one, why not a better one.

    `crc32c` is `avx512`, `sse42` or `portable`, `copy` is `avx512`, `avx2` or `portable`; `crc32c_why_not_better` and
    `copy_why_not_better` are empty for the best. The environment variables `KVSTORE_CRC32C` and `KVSTORE_COPY` force a
    path, and the import fails where this CPU cannot run it. `copy_is_fused`: whether a copy with checksum takes one
    pass. `copy_stream_bytes`: plans of at least so many bytes are stored past the caches.
    """

class Needs:
    """The records that a worker needs at each node of a path.

    `groups` has (group, is_state, spans, units) of each, ascending; a reader that accepts lossy records is served
    with them too.
    """

    def __init__(self, groups: Sequence[tuple[int, bool, int, Sequence[int]]], accepts_lossy: bool = False) -> None: ...

class Finding:
    """What a match found: resume points, and what stood in the way of deeper ones; lengths are 0 where none is."""

    @property
    def tokens(self) -> int: ...
    @property
    def candidates(self) -> list[tuple[int, int, bytes | None]]: ...
    @property
    def has_tails(self) -> bool: ...
    @property
    def tails(self) -> list[tuple[int, int, bytes, int]]: ...
    @property
    def branch_points(self) -> list[int]: ...
    @property
    def attention_tokens(self) -> int: ...
    @property
    def pending_tokens(self) -> int: ...
    @property
    def evicted_state_tokens(self) -> int: ...
    @property
    def evicted_attention_tokens(self) -> int: ...
    @property
    def foreign_state_tokens(self) -> int: ...
    @property
    def is_other_grid(self) -> bool: ...
    @property
    def is_other_shard(self) -> bool: ...

class HeldRows:
    """The records of a resume point, and its nodes."""

    @property
    def last_node(self) -> int: ...
    def rows(self) -> tuple[NDArray[np.uint64], bytes]: ...

class WriteSet:
    """What a writer reserves, and the nodes that it relies on."""

    @property
    def is_wrong_path(self) -> bool: ...
    @property
    def gap_node(self) -> int | None: ...
    @property
    def new_nodes(self) -> int: ...
    @property
    def last_node(self) -> int: ...
    def missing(self) -> tuple[NDArray[np.uint64], bytes]: ...
    def held(self) -> tuple[NDArray[np.uint64], bytes]: ...
    def set_slots(self, slots: NDArray[np.uint64]) -> None: ...

class PrefixIndex:
    """Which records are there, for which prefix. Not thread-safe: the pool calls it under its lock.

    Paths are `NodePath.packed`, grids `ChunkGrid.packed`; nodes are numbers that stay valid while something holds
    them. Tables of slots are uint64 of shape [n, 3]: index, generation, bytes. Names are uint64 of shape [n, 6]:
    node, group, span, first unit, unit after the last, number of the chunk grid digest. Packed nodes are keys, parents,
    numbers of shape [n, 4] (end_tokens, number of the root, first of the tail's ids, how many there are), the ids of
    all tails as 32-bit integers, and roots with their salts.
    """

    LASTING_US: int
    NODE_BYTES: int
    RECORD_BYTES: int

    def __init__(
        self, is_state_group: Sequence[bool], ghosts_max: int, keeps_order: bool, keeps_salt_orders: bool = False
    ) -> None: ...
    def __len__(self) -> int: ...
    @property
    def ghost_count(self) -> int: ...
    @property
    def record_count(self) -> int: ...
    @property
    def committed_bytes(self) -> int: ...
    @property
    def lost_records(self) -> int: ...
    @property
    def memory_bytes(self) -> int: ...
    @property
    def allocated_bytes(self) -> int: ...
    @property
    def bytes_by_salt(self) -> dict[bytes, int]: ...
    @property
    def pushed_count(self) -> int: ...
    @property
    def node_share_bytes(self) -> int: ...
    def share_of(self, salt: bytes) -> int: ...
    def find(self, key: bytes) -> int | None: ...
    def match(
        self,
        path: _PackedPath,
        token_ids: NDArray[np.uint32],
        cap_tokens: int,
        needs: Needs,
        grid: tuple[bytes, bytes] | None,
        candidates_max: int,
        excluded: Sequence[int],
    ) -> Finding: ...
    def collect(
        self,
        path: _PackedPath,
        needs: Needs,
        grid: tuple[bytes, bytes] | None,
        places: tuple[NDArray[np.uint64], bytes] | None = None,
    ) -> HeldRows | None: ...
    def hold(self, held: HeldRows) -> None: ...
    def release(self, held: HeldRows) -> NDArray[np.uint64]: ...
    def missing(
        self, path: _PackedPath, names: NDArray[np.uint64], digests: bytes, is_lossy: bool = False
    ) -> list[int]: ...
    def plan(
        self, path: _PackedPath, names: NDArray[np.uint64], digests: bytes, is_lossy: bool = False
    ) -> WriteSet: ...
    def enter(
        self, writes: WriteSet, path: _PackedPath, salt: bytes, basis_tail: Sequence[int], resume_nodes: Sequence[int]
    ) -> None: ...
    def undo(self, writes: WriteSet) -> None: ...
    def commit(
        self,
        writes: WriteSet,
        ready: NDArray[np.uint64],
        costs_us: NDArray[np.uint64],
        tier: int = 0,
        codec: int = 0,
        is_lossy: bool = False,
        ends_at_us: int = ...,
        committed_nodes: int = 0,
    ) -> list[int]: ...
    def leave(self, writes: WriteSet) -> None: ...
    def let_go(self, writes: WriteSet) -> NDArray[np.uint64]: ...
    def write_counted(
        self,
        path: _PackedPath,
        salt: bytes,
        needs: Needs,
        block_bytes: int,
        states: Sequence[tuple[int, int]],
        capacity_bytes: float,
        records_max: int,
    ) -> tuple[Literal["written", "no room", "too many", "wrong path"], int, int]:
        """Enter what is missing of a path's attention, and of states (blocks from 1, bytes), whose bytes only count.

        What was used longest ago is evicted for it. Returns how it went, the bytes written and those evicted.
        """
    def set_end(self, path: _PackedPath, ends_at_us: int, after_tokens: int = ..., meant_tokens: int = 0) -> int: ...
    def stored_tokens(self, path: _PackedPath) -> int: ...
    def expire(self, now_us: int, even_written: bool = False) -> NDArray[np.uint64]: ...
    def take_expired(self) -> list[tuple[bytes, bool]]: ...
    def ends_of(self, keys: bytes) -> NDArray[np.uint64]: ...
    def prolong(self, keys: bytes, ends_us: NDArray[np.uint64]) -> None: ...
    def restore_ends(self, keys: bytes, ends_us: NDArray[np.uint64]) -> None: ...
    @property
    def next_end_us(self) -> int: ...
    @property
    def life_bytes(self) -> int: ...
    def evict(self, node: int, states_only: bool) -> NDArray[np.uint64]: ...
    def condemn(self, node: int, is_state: bool) -> NDArray[np.uint64]: ...
    def has_slot(self, node: int, is_state: bool, slot_index: int, slot_generation: int, slot_bytes: int) -> bool: ...
    def drop_ghosts(self, count: int) -> int: ...
    def choose(self, target_bytes: int) -> int: ...
    def choose_in(self, salt: bytes, target_bytes: int) -> int: ...
    def choose_named_in(self, salt: bytes, keys: bytes, are_states: bytes, target_bytes: int) -> int: ...
    def push_victims(self, keys: bytes, are_states: bytes) -> None: ...
    @property
    def chosen_count(self) -> int: ...
    def chosen_slots(self, count: int) -> NDArray[np.uint64]: ...
    def trim_choice(self, count: int) -> None: ...
    def evict_chosen(self) -> NDArray[np.uint64]: ...
    def drop_choice(self) -> None: ...
    def condemn_all(self, mask: int, value: int) -> NDArray[np.uint64]: ...
    def touch_path(self, path: _PackedPath) -> None: ...
    def restore(self, block_tokens: int, nodes: _PackedNodes, records: NDArray[np.uint64], digests: bytes) -> bytes: ...
    def survey(
        self, mask: int, value: int, in_order: bool = False
    ) -> tuple[_PackedNodes, tuple[NDArray[np.uint64], bytes]]: ...
    def relocate(self, keys: bytes, moves: NDArray[np.uint64]) -> bytes: ...
    def take_events(self) -> list[tuple[int, int, bytes, bool, int, int]]: ...
    def watch(self, is_watched: bool) -> None: ...
    @property
    def change_count(self) -> int: ...
    def take_changes(self) -> tuple[bytes, bytes, NDArray[np.uint64], list[bytes]]:
        """Keys, parents' keys, (is added, are states, end tokens, bytes, salt) of each, and the salts by number."""
    def contents(self) -> tuple[bytes, bytes, NDArray[np.uint64], list[bytes]]:
        """What is there, as `take_changes` says it; in no order."""
    def take_lost_handovers(self) -> list[int]: ...
    def salt(self, node: int) -> bytes: ...
    def holds_records(self, node: int) -> bool: ...
    def is_tail(self, node: int) -> bool: ...
    def is_transient(self, node: int) -> bool: ...
    def set_transient(self, node: int, is_set: bool) -> None: ...
    def set_handover(self, node: int, is_set: bool) -> None: ...
    def remove_unchecked(self, node: int, is_state: bool) -> NDArray[np.uint64]: ...
    def check(self) -> str: ...

# Transfers: sockets, frames, and the pieces that cross. See the docstrings of the module itself.

def pack_frame_header(
    kind: int,
    flags: int,
    epoch: int,
    counter: int,
    generation: int,
    payload_bytes: int,
    piece_count: int,
    payload_crc32c: int,
) -> bytes:
    """The 64 bytes of a frame header. Raises `ProtocolError` beyond the limits."""

def parse_frame_header(data: Buffer) -> tuple[int, int, int, int, int, int, int, int]:
    """The fields of a frame header, in the order of `pack_frame_header`.

    Raises:
        ProtocolError, PeerMismatchError: as `kvstore.transfer.frames.parse_header`. ValueError: not 64 bytes.
    """

def frame_limits() -> dict[str, int]:
    """The limits that frames are checked against, by their names in `kvstore.limits`."""

def socket_information(descriptor: int) -> SocketInformation:
    """TCP_INFO and TCP_CONGESTION of a connected socket; every field is None for one that is not TCP.

    Raises:
        TransportError: no open socket.
    """

class Stream:
    """A connected stream socket. One thread receives, any thread sends whole frames, any thread closes.

    Owns the descriptor. Moments are of `time.monotonic()`; waits release the GIL. What raises `PeerGoneError` or
    `TransportError` in the middle of a frame closes the connection.
    """

    progress_deadline_s: float
    """The longest that one slice of 512 KiB may take."""
    def __init__(self, descriptor: int, peer_address: str, progress_deadline_s: float) -> None: ...
    def send(self, buffers: Sequence[Buffer]) -> None: ...
    def receive_header(self, deadline_s: float) -> bytes: ...
    def receive_into(self, into: Buffer) -> None: ...
    def wait_readable(self, deadline_s: float) -> bool: ...
    @property
    def is_connected(self) -> bool:
        """False once either side has ended the connection, or it broke, as far as the kernel knows by now."""
    def close(self) -> None: ...
    @property
    def frames_arrived(self) -> int:
        """DATA frames that have arrived whole."""
    @property
    def last_sent_s(self) -> float: ...
    @property
    def last_received_s(self) -> float: ...

class SocketInformation:
    """What the kernel knows of a TCP connection; None is what it does not say. Counts from the beginning."""

    @property
    def round_trip_s(self) -> float | None: ...
    @property
    def round_trip_variation_s(self) -> float | None: ...
    @property
    def round_trip_min_s(self) -> float | None: ...
    @property
    def delivery_bytes_per_s(self) -> float | None: ...
    @property
    def is_app_limited(self) -> bool | None: ...
    @property
    def retransmits(self) -> int | None: ...
    @property
    def segments_sent(self) -> int | None: ...
    @property
    def sent_bytes(self) -> int | None: ...
    @property
    def acknowledged_bytes(self) -> int | None: ...
    @property
    def retransmitted_bytes(self) -> int | None: ...
    @property
    def window_segments(self) -> int | None: ...
    @property
    def in_flight_segments(self) -> int | None: ...
    @property
    def segment_bytes(self) -> int | None: ...
    @property
    def unsent_bytes(self) -> int | None: ...
    @property
    def busy_s(self) -> float | None: ...
    @property
    def receiver_limited_s(self) -> float | None: ...
    @property
    def buffer_limited_s(self) -> float | None: ...
    @property
    def congestion_control(self) -> str | None: ...

class StopFlag:
    """Tells a native loop to return at the next frame. Any thread."""

    def set(self) -> None: ...
    def clear(self) -> None: ...
    @property
    def is_set(self) -> bool: ...

class Traffic:
    """Whose turn it is, among the transfers of one sender. Any thread."""

    def __init__(self) -> None: ...

class TrafficFlow:
    """One transfer among others: its priority (0 first) and its peer. Any thread.

    A background flow leaves few bytes in the kernel, so that others can overtake it. A paced one holds up nobody.
    """

    def __init__(self, traffic: Traffic, priority: int, is_background: bool, is_paced: bool, peer: str) -> None: ...

class PieceLayout:
    """Where the pieces of one class of records lie: offsets (uint64) and sizes (uint32), `[pieces]`. Immutable."""

    def __init__(self, offsets: NDArray[np.uint64], sizes: NDArray[np.uint32], checksum_offset: int) -> None: ...
    @property
    def piece_count(self) -> int: ...

class Arrivals:
    """Which pieces of a transfer its receiver wants, is receiving and has, and the credit. Any thread."""

    def __init__(self, record_count: int) -> None: ...
    def add_records(self, numbers: NDArray[np.uint32], layout: PieceLayout, addresses: NDArray[np.uint64]) -> None: ...
    def attach(self, epoch: int, counter: int, generation: int, window_bytes: int) -> None: ...
    def claim(self, rows: Buffer | NDArray[Any], body_bytes: int | None) -> None: ...
    def lose(self, rows: Buffer | NDArray[Any], consumed_bytes: int) -> None: ...
    def settle(self, rows: Buffer | NDArray[Any], computed: NDArray[np.uint32]) -> tuple[bytes, list[int]]: ...
    def consume(self, size_bytes: int, is_quiet: bool) -> int | None: ...
    def grant_window(self) -> int: ...
    @property
    def consumed_bytes(self) -> int: ...
    def note_seals(self, records: NDArray[np.uint32]) -> list[int]: ...
    def pending(self, record: int) -> tuple[int, int, bool]: ...
    def missing_ranges(self) -> bytes: ...
    def counts(self) -> tuple[int, int, int]: ...

class Departures:
    """What is left to send of a transfer. Any thread."""

    def __init__(
        self, layouts: list[PieceLayout], layout_numbers: NDArray[np.uint32], addresses: NDArray[np.uint64]
    ) -> None: ...
    def pieces_whole(self, record: int, pieces: NDArray[np.uint32]) -> None: ...
    def record_sealed(self, record: int, cost_us: int) -> None: ...
    def records_complete(self, first: int, costs_us: NDArray[np.uint64]) -> None: ...
    def want(self, ranges: Buffer | NDArray[Any], is_again: bool) -> int: ...
    def grant(self, granted_bytes: int) -> None: ...
    def take(self, frame_bytes_max: int, is_remote: bool) -> tuple[bytes, int, bool]: ...
    def sent(self, rows: Buffer) -> None: ...
    def unsent(self, rows: Buffer) -> None: ...
    def lost(self, connection: int, frames_arrived: int) -> int: ...
    @property
    def has_left(self) -> bool: ...
    @property
    def left_bytes(self) -> int: ...
    def next_seals(self, count_max: int) -> bytes: ...
    @property
    def pieces_sent(self) -> int: ...
    def bytes_sent_by_record(self) -> bytes: ...

def receive_pieces(
    stream: Stream,
    control: Stream,
    arrivals: Arrivals,
    epoch: int,
    counter: int,
    generation: int,
    deadline_s: float,
    linger_s: float,
    is_observed: bool,
    stop: StopFlag,
    *,
    is_verified: bool = True,
) -> tuple[int, bytes, str, int, tuple[bytes, list[int]], bytes]:
    """Receive DATA frames straight into their records until there is something to tell; no GIL meanwhile.

    Returns (event, header, reason, unread_bytes, (damaged rows, completed records), rows); the events are those of
    `kvstore.transfer.native`. The caller keeps the records in place. Without `is_verified` damage passes as data:
    for a benchmark that measures what checksums cost.

    Raises:
        PeerGoneError, ProtocolError, PeerMismatchError, TransportError: the stream is over.
    """

def send_pieces(
    stream: Stream,
    departures: Departures,
    epoch: int,
    counter: int,
    generation: int,
    frame_bytes_max: int,
    unsent_bytes_max: int,
    connection: int,
    until_s: float,
    is_observed: bool,
    stop: StopFlag,
    flow: TrafficFlow,
) -> tuple[int, float, bytes, bool]:
    """Send DATA frames straight from their records until nothing can be sent; no GIL meanwhile.

    Returns (frames, when the first had left, rows of the last one if observed, whether it was other transfers' turn
    until the end). The caller keeps the records in place. `unsent_bytes_max` of what was sent may wait in the kernel;
    0 leaves it to the kernel.

    Raises:
        PeerGoneError, TransportError: the stream is over.
    """

class FileEngine:
    """Moves bytes between files and memory on threads of its own. Any thread.

    Args:
        name: one of `file_engines`.
        depth, urgent_depth: pieces under way at once, and how many more of urgent operations.
        piece_bytes: operations are begun in parts of at most this; a multiple of 4096.

    Raises:
        OSError: the system does not give what it needs.
    """

    BATCH_OPERATIONS_MAX: int
    OPERATIONS_MAX: int
    ALIGN_BYTES: int
    WHY_FILE_END: int
    """Why an operation failed: the file ends within what was to be read."""
    WHY_ENGINE: int
    """Why an operation failed: the engine itself has, and so will every later operation of it."""

    def __init__(self, name: str, depth: int, urgent_depth: int, piece_bytes: int) -> None: ...
    def add_file(self, descriptor: int) -> int:
        """A number for an open descriptor, which stays the caller's. Numbers do not come again."""

    def remove_file(self, file: int) -> None:
        """The number ends. Raises `ValueError` while its operations have not ended."""

    def submit(self, operations: NDArray[np.uint64], is_urgent: bool) -> FileEngineBatch:
        """Rows of `kvstore.abc.files.Files.submit`. Raises `ValueError`; nothing was begun."""

    def cancel(self, batch: FileEngineBatch) -> None:
        """What has not been begun ends with ECANCELED."""

    def close(self) -> None:
        """Wait for what has been begun. Idempotent; in a forked child it does nothing."""

class FileEngineBatch:
    """Operations that were submitted together. Any thread."""

    def __len__(self) -> int: ...
    def wait(self, count: int, until_s: float) -> int:
        """How many have ended, once `count` have or the monotonic clock shows `until_s`; no GIL meanwhile."""

    def ended(self) -> bytes:
        """Numbers of those that have ended, in that order (int64)."""

    def failures(self) -> bytes:
        """(operation, error number, file, offset, why) of those that failed (int64); why: a `FileEngine.WHY_`, or 0."""

    @property
    def descriptor(self) -> int: ...

def file_engines(depth: int) -> list[tuple[str, str]]:
    """(name, what is missing here for it) of each engine, from best to worst."""

def choose_file_engine(depth: int, forced: str | None = None) -> tuple[str, str]:
    """(name, why not a better one). Without `forced` the environment variable KVSTORE_IO can force one.

    Raises:
        RuntimeError: the one that is forced is unknown or cannot run here.
    """
