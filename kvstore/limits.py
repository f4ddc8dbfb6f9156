"""Every maximum of the library, what it means and what it costs.

Relations between limits are asserted at import.
"""

from __future__ import annotations

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

# Keys
TOKEN_ID_MAX = (1 << 32) - 1
"""Token ids are hashed as unsigned 32-bit integers."""
PROMPT_TOKENS_MAX = 1 << 24
"""Tokens of one prompt: 16 million ids are 64 MiB of key input and 8 MiB of keys at 64-token blocks."""
SALT_BYTES_MAX = 1024
"""Salts and adapter names enter the root of each key chain."""
EXTRA_BYTES_MAX = 64 * KIB
"""Extra bytes (image digests and the like) of one block."""

# Spec
BLOCK_TOKENS_MIN = 1
BLOCK_TOKENS_MAX = 256
"""Tokens per block. Production specs use 16 to 256; smaller ones keep tests small."""
LAYERS_MAX = 4096
GROUPS_MAX = 64
TENSORS_PER_GROUP_MAX = 16
SHARD_UNITS_MAX = 4096
"""Shard units of one tensor: (KV or state heads) x segments."""
SPEC_FILE_BYTES_MAX = 16 * MIB
"""A spec file. One of 64 groups with 4096 layers each takes 4 MiB."""

# Records
SPAN_BYTES_MAX = 8 * MIB
"""Layers are put into one record up to this many bytes."""
RECORD_BYTES_MAX = 64 * MIB
"""A single layer larger than a span is a record class of its own, up to this size."""
RECORD_ALIGN_BYTES = 4096
"""Header and slot sizes are multiples of this, so that DRAM, direct I/O and the wire share one form."""
RECORD_HEADER_BYTES_MAX = 256 * KIB
"""Schema and batch metadata of a record. A reader refuses more before it parses anything."""

# SSD tier
FILE_ALIGN_BYTES = 4096
"""Addresses, offsets and sizes of direct I/O are multiples of this."""
FILE_PIECE_BYTES = 1 * MIB
"""Reads and writes are begun in parts of at most this, so that one large read fills the queue of a drive."""
FILE_DEPTH_DEFAULT = 32
"""Pieces under way at once in the files of one directory; with the engine `threads` each has a thread."""
FILE_DEPTH_MAX = 256
FILE_URGENT_DEPTH = 8
"""As many more for urgent operations, so that one begins at once behind a queue that is full."""
FILE_BATCH_OPERATIONS_MAX = 1 << 18
FILE_OPERATIONS_MAX = 1 << 20
"""Operations of one directory that have not ended, about 100 bytes each."""
FILES_IDLE_MAX = 1024
"""Sealed segments of one directory that are kept open for the next read; others are opened again when they are read."""
FILES_IDLE_FRACTION = 1 / 8
"""Share of the files that this process may open (`ulimit -n`) that those of one directory take at most."""
SEGMENT_BYTES_MIN = 4 * MIB
SEGMENT_FRACTION = 1 / 256
"""Share of a directory's capacity that one segment takes."""
OPEN_SEGMENTS_MAX = 256
"""Segments of one directory that are written to at a time, one per record class; the one used the longest ago is sealed
for another."""
SEGMENTS_MAX = 1 << 16
"""Segment files of one directory."""
SSD_APPEND_ROWS_MAX = 1 << 16
"""Nodes, records or forgotten names of one append."""
JOURNAL_FRAME_BYTES_MAX = 32 * MIB
"""One batch of the journal."""
JOURNAL_BYTES_MAX = 16 * GIB
"""About 130 bytes a record: 16 TB of 128 KiB records. Recovery needs some times the memory of what is valid in it."""
SSD_RECOVERY_DEADLINE_S = 600.0
"""For any one read or write while a directory is being opened."""
SSD_SETTLE_S = 10.0
"""How long a failed append waits for the writes that it had begun, before it gives the directory up."""
SSD_CLOSE_DEADLINE_S = 30.0
"""How long closing an SSD tier waits for what was begun on its drives, before it gives up and leaves it as it is."""
SSD_DIRECTORIES_MAX = 64
"""Directories, hence drives, of one SSD tier."""
SSD_CAPACITY_BYTES_MIN = 1 * MIB
"""The least that a directory of an SSD tier may be given."""
SSD_SEGMENT_FRACTION_MAX = 1 / 32
"""Share of a small directory's capacity that one segment takes at most."""
SSD_QUEUE_BYTES_DEFAULT = 1 * GIB
"""Records that wait to be written keep their memory meanwhile; more are refused."""
SSD_BATCH_BYTES_DEFAULT = 256 * MIB
"""Records that are made durable together: each batch costs four waits for the drive, of some milliseconds, in which
little moves."""
SSD_WRITE_DEADLINE_S = 60.0
"""How long making one batch durable may take."""
SSD_BUDGET_BURST_FRACTION = 1 / 8
"""Share of a day's writes that may be used at once."""
SSD_READ_ERRORS_MAX = 16
"""Reads that may fail on one drive before it is left out with all that it holds."""
SSD_CLEAN_BYTES = 16 * MIB
"""Records of a segment that are moved at a time when it is cleaned: memory that cleaning takes."""
SSD_BUDGET_SAVE_S = 60.0
"""How often what is left of a day's writes is saved."""
SSD_UNSAFE_ENDS_MAX = 1 << 17
"""Nodes of whose ends a drive has not written all; past that, those of no node are said to outlive a crash."""

# Device memory
DEVICE_POLL_MIN_S = 20e-6
"""How soon a device is asked again whether it has finished, doubling up to the next."""
DEVICE_POLL_MAX_S = 1e-3
DEVICE_SLAB_BYTES_MIN = 64 * KIB
"""Device memory is divided into slabs of at least this, each for one slot size."""
STAGING_BUFFER_BYTES = 8 * MIB
"""A page-locked buffer between host and device."""
STAGING_BUFFERS = 4
"""Buffers of one ring: two fill while two travel."""
DEVICE_WINDOW_BYTES = 32 * MIB
"""Records that are asked of a copy stream at a time, from memory that is page-locked itself."""
DEVICE_WINDOWS_MAX = 4
"""Windows under way at once."""
DEVICE_KEEPS_MAX = 256
"""Resume points that wait to be copied to a device; more are refused."""
DEVICE_COPY_DEADLINE_S = 30.0
"""How long a caller waits for a device, and after which a copy counts as overdue. Memory that it uses stays taken."""
PAGES_MAX = 1 << 26
"""Pages of one of an engine's tensors: 64 million pages of 16 tokens are a billion tokens."""
PAGE_STAGING_BYTES = 32 * MIB
"""Memory through which one copy between pages and records goes at a time, on the device and on the host each, and each
twice: one part is filled while the other is emptied. A single larger part takes what it needs."""
PAGE_COPIES_MAX = 2
"""Copies between pages and records that move at once; others wait."""
PAGE_LOCATIONS_MAX = 4
"""Places in pages that are remembered of one record, where several requests have computed the same prefix."""
PAGE_FORGET_DEADLINE_S = 5.0
"""How long an engine waits by default for copies from pages that it wants to reuse."""

# Arena
MEMORY_SPARE_FRACTION = 1 / 32
"""Share of the memory that is available which an arena leaves to everything else on the machine."""
ARENA_NAME_CHARACTERS_MAX = 128

# Copies
COPY_THREADS_MAX = 16
"""Threads that one native call may use, and helpers beside their callers that all calls of a process may have."""
COPY_THREADS_DEFAULT = 4
"""Threads that a large copy uses unless KVSTORE_COPY_THREADS says otherwise: a few saturate the memory of a socket."""
COPY_BYTES_PER_THREAD_MIN = 4 * MIB
"""A copy gets a thread for each so many bytes: starting one (20 us) costs about as much as copying 400 KB."""

# Pool
GHOSTS_MAX = 1 << 16
"""Prefix nodes kept after their records are gone, about 130 bytes each."""
VICTIMS_AHEAD = 256
"""Victims that an eviction policy names at a time, before they are needed."""
VICTIMS_AHEAD_MIN = 64
"""With fewer left, the policy is asked again after the next commit."""
CANDIDATES_MAX = 64
"""Candidates that one match reports, deepest first."""
SPARSE_NODES_BYTES_MAX = 64 * MIB
"""Memory of the hints by which sparse nodes are found, about 320 bytes and a mask each."""
SPARSE_VARIANTS_MAX = 16
"""Coverages of one prompt that a match looks at for a reader that accepts any."""
CHECKPOINTS_PER_WRITE_MAX = 64
PINS_MAX = 4096
"""Pins of one store."""
LIFE_S_MAX = 10 * 365 * 86400.0
"""The longest time to live of a prefix, and of a pin: ten years. What lasts longer has none."""
PINNED_FRACTION_MAX = 0.5
"""Share of a tier's capacity, and of a salt's quota, that pins may take unless `StoreLimits` says otherwise."""
QUARANTINE_FRACTION_MAX = 0.25
"""Share of a tier's capacity that may wait for dropped writers before new writes are refused."""
HANDOVER_PAYLOAD_BYTES_MAX = 16 * MIB
"""Logits and the like that travel with the first sampled token."""
HANDOVERS_PER_PROMPT_MAX = 64
"""Hand-overs of one and the same prompt that wait to be taken."""
OPEN_WAITS_MAX = 4096
"""Handles of one store that wait for a hand-over or a resume point."""

# Further tiers
SHELVES_MAX = 8
"""Tiers beside the pool's memory: each match asks all of them."""
LOADS_MAX = 64
"""Resume points that are loaded from other tiers at once; each has a thread."""
LOAD_BATCH_BYTES = 16 * MIB
"""Records of a load are verified together up to this many bytes, while later ones still come."""
LOAD_DEADLINE_S = 60.0
"""How long a read waits by default for what has to be loaded."""
LOAD_PROGRESS_DEADLINE_S = 30.0
"""A load of which nothing comes for this long has failed."""
FLUSH_DEADLINE_S = 60.0
"""How long a flush waits by default."""
KEEP_QUEUE_MAX = 4096
"""Resume points that wait to be kept in other tiers, about 300 bytes each besides their keys; then the oldest goes."""
KEEP_PINNED_FRACTION_MAX = 0.25
"""Share of the pool's memory that may be pinned while it is kept elsewhere; a single resume point may be more."""
KEPT_KNOWN_MAX = 1 << 14
"""Resume points that are remembered as kept, so that a hit on them asks nothing."""
KEEP_AGAIN_S = 60.0
"""What a tier has refused is offered to it again after this long, if somebody reads it. A commit does not wait."""
KEEP_CLOSE_DEADLINE_S = 10.0
"""How long closing a store waits for what was committed to be kept in other tiers."""

# Events
EVENTS_CAPACITY_MAX = 1 << 20
"""Events that one stream keeps for a subscriber that does not take them."""
EVENTS_CAPACITY_DEFAULT = 4096
EVENT_BLOCKS_MAX = 4096
"""Blocks that one event names, about 110 bytes each; a change of more comes as several events."""
GONE_KEYS_MAX = 1024
"""Nodes of which the index remembers that damage or age took them."""

# Attached processes
ATTACHED_PROCESSES_MAX = 256
"""Processes attached to one owner, those counted that have gone silent and still have memory mapped."""
ATTACH_MESSAGE_BYTES_MAX = 128 * MIB
"""One message between an attached process and its owner; token ids of the longest prompt are 64 MiB."""
ATTACH_TEXT_BYTES_MAX = 4096
"""A reason, an error message, a name."""
ATTACH_RECORDS_MAX = 1 << 20
"""Records of one lease or one writer of an attached process."""
ATTACHED_LEASES_MAX = 4096
"""Leases that one attached process holds at once."""
ATTACHED_WRITERS_MAX = 1024
"""Writers that one attached process has open at once."""
ATTACHED_WAITS_MAX = 64
"""Loads and flushes that the owner does for one attached process at once; each has a thread."""
ATTACH_DEADLINE_S = 5.0
"""How long an attached process waits for its owner's answer before it takes the owner for gone."""
ATTACHED_SILENCE_S = 10.0
"""An attached process that is silent for longer loses its leases and writers."""
JOINT_PARTIES_MAX = 4096
"""Writers of one joint commit."""
JOINT_COMMITS_MAX = 4096
"""Joint commits that are under way or remembered as failed."""
JOINT_NAME_BYTES_MAX = 256
JOINT_COMMIT_DEADLINE_S = 30.0
"""How long a party of a joint commit waits for the others by default."""
JOINT_OUTCOME_GRACE_S = 60.0
"""How long a failed joint commit is remembered, so that a party that comes late is told."""

# Objects under an engine's own keys
FOREIGN_NAME_BYTES_MAX = 1024
"""A key, a group's name, a hash root, and whatever else says whose keys are meant."""
FOREIGN_GROUPS_MAX = 64
FOREIGN_CHUNK_BYTES_MAX = SPAN_BYTES_MAX
"""Objects are cut into records of at most this: several copy and load at once."""
FOREIGN_CHUNKS_MAX = 4096
"""Records of one object."""
FOREIGN_OBJECT_BYTES_MAX = 1 * GIB
FOREIGN_BATCH_OBJECTS_MAX = 4096
"""Objects of one call, about a microsecond each before anything is done."""
FOREIGN_BATCH_BYTES = 64 * MIB
"""Objects that are reserved, or held, at a time; a call of more goes on when these are done."""
FOREIGN_LOADS_MAX = 32
"""Objects of one call that are loaded from other tiers at once."""
FOREIGN_SALTS_MAX = 4096
"""Salts whose root is remembered."""
FOREIGN_THREADS_DEFAULT = 2
"""Threads that store what one foreign store was asked for asynchronously, and as many more that load."""
FOREIGN_WAITING_MAX = 256
"""Asynchronous calls that wait for them; more are declined."""
FOREIGN_CLOSE_DEADLINE_S = 30.0
"""How long closing a foreign store waits for what runs."""

# Transfer
FRAME_HEADER_BYTES = 64
FRAME_PAYLOAD_BYTES_MAX = 16 * MIB
"""One control message, or the piece table plus the pieces of one DATA frame unless one piece is larger."""
FRAME_PIECES_MAX = 4096
OFFER_RECORDS_MAX = 1 << 18
TRANSFERS_PER_NODE_MAX = 256
TRANSFERS_PER_PEER_MAX = 64
OFFERS_WAITING_MAX = 256
"""Offers that wait for space or for a place among a node's transfers; the least urgent one goes without first."""
CONNECTIONS_PER_NODE_MAX = 1024
CONNECTIONS_PER_TRANSFER_MAX = 64
"""The first one and those that join it; each has a thread at both ends."""
IDLE_CONNECTIONS_MAX = 64
"""Connections of a sender that wait for its next transfer, to all receivers together."""
CREDIT_BYTES_DEFAULT = 64 * MIB
"""Bytes of one transfer that may be in flight before the receiver grants more."""
PROGRESS_DEADLINE_S = 5.0
"""A transfer in which nothing moves for this long has failed."""
CONNECT_DEADLINE_S = 5.0
TRANSFER_RATE_MIN_BYTES_PER_S = 1 * MIB
"""The default total deadline of a transfer assumes at least this rate."""
TRANSFER_DEADLINE_MAX_S = 3600.0
"""The longest total deadline: what a peer may keep reserved without committing it is bounded."""
TRANSFER_PRIORITY_MAX = 255
"""Priorities are one byte; 0 goes first."""
TRANSFER_PRIORITY_DEFAULT = 128
QUERY_PARTS_MAX = 1 << 16
"""Chunk boundaries, and extra inputs, of one question to another node: each takes it some microseconds."""
QUERY_DEADLINE_S = 10.0
"""How long a question to another node may take by default: connecting and its answer."""
OUTCOME_GRACE_S = 60.0
"""How long both sides remember how a transfer ended, so that COMMIT is idempotent."""
OUTCOMES_MAX = 4096
LINKS_MAX = 1024
"""Peers whose links a sender remembers measurements of, about 2 KB each; then the one used the longest ago goes."""

# Node
NODE_ADDRESSES_MAX = 16
"""Addresses that one node listens on; they label its metrics."""
NODE_CONFIG_BYTES_MAX = 1 * MIB
NODE_SETTING_CHARACTERS_MAX = 4096
"""A path or an address in a node's configuration."""
NODE_DRAIN_S_MAX = 3600.0
NODE_DEADLINE_S_MAX = 3600.0
"""Of any deadline of transfers that an operator sets."""
NODE_LIFE_S_MAX = 7 * 24 * 3600.0
"""Of the longest lease and writer that a node's operator sets."""
NODE_COUNT_MAX = 1 << 16
"""Of any number of transfers, connections or pieces that an operator sets; each connection has a thread."""
NODE_QUOTAS_MAX = 4096
"""Salts that have a quota of their own in a node's configuration."""
HTTP_CONNECTIONS_MAX = 16
"""Requests that a node's health endpoint serves at once; each has a thread."""
HTTP_REQUEST_BYTES_MAX = 16 * KIB
"""Request line and headers; what follows is not read."""
HTTP_DEADLINE_S = 5.0
"""For one request and its answer together."""

# Schedule
PROFILE_POINTS_MAX = 256
"""Points or coefficients of one curve of a profile."""
DECODE_PLACES_MAX = 1 << 22
"""Requests that one cluster decodes at once, for which a plan's latency is computed; some 50 bytes each."""
PROFILE_FILE_BYTES_MAX = 1 * MIB
"""A profile's file. One with 256 points in each curve takes 30 KiB."""
PROFILE_TEXT_CHARACTERS_MAX = 4096
"""Of a name, a source or a note in a profile's file."""
PROFILE_NUMBER_MAX = 1e18
"""Of any number in a profile, and of seconds at both ends of its curves; its reciprocal bounds these from below."""
PROFILE_ROUNDS_MAX = 1000
"""Of one measurement; each goes over all lengths and batches."""
PROFILE_BATCH_MAX = 65_536
"""Requests of a decode batch that is measured."""
PROFILE_DECODE_STEPS_MAX = 1024
"""Timed in one round of one batch."""
PROFILE_DEADLINE_S = 86_400.0
"""For all of one measurement."""
CLUSTERS_MAX = 64
BYTES_PER_S_MIN = 1.0
BYTES_PER_S_MAX = 1e15
"""Of a link, and of what may leave or enter a cluster: far beyond any, and so that sums and ratios stay finite."""
ROUND_TRIP_S_MAX = 3600.0
INSTANCES_MAX = 65_536
"""Of one kind in one cluster."""
LENGTHS_MAX = 1 << 20
"""Different lengths of prompts in one distribution."""
SCENARIO_BYTES_MAX = 1 * MIB
"""A scenario's file."""
SCENARIO_ENTRIES_MAX = 4096
"""Clusters, links or faults in a scenario's file; of clusters there are fewer."""
SCENARIO_TEXT_CHARACTERS_MAX = 4096
"""A name or a path in a scenario's file."""
SCENARIO_NUMBER_MIN = 1e-12
SCENARIO_NUMBER_MAX = 1e18
"""Sizes of the numbers in a scenario's file that are not 0: what lies outside is a slip, and would overflow later."""
SCENARIO_LINK_BYTES_PER_S_MIN = 1e5
"""Of links, egress and ingress in a scenario's file; with less than a megabit a second somebody has meant gigabits."""
SCENARIO_TELEMETRY_S_MIN = 1e-3
"""Each observation is an event of the simulation."""
SCENARIO_REQUESTS_MAX = 1_000_000_000
SCENARIO_BLOCK_TOKENS_MAX = 1 << 16
PREFILL_PIECE_TOKENS_MIN = 16
"""Of a chunk, or of a prompt's share in a group of layers; smaller ones only read weights."""
LINEAR_CELLS_MAX = 1 << 24
"""Of the tableau of a linear program, 8 bytes each."""
PLANS_MAX = 2_000_000
"""Plans that an exhaustive search may try, some microseconds each."""
ADMITTED_MAX = 65_536
"""Admitted requests of one cluster whose end admission plans with; further ones are seen once they decode."""
RECENT_LENGTHS_MAX = 1024
"""Lengths of the latest prompts that conversions are decided by."""
ROUTING_SOURCES_MAX = 4
"""Clusters that a prompt's prefix could be moved from which a router weighs, those with the deepest first."""
ROUTING_CANDIDATES_MAX = 64
"""Routes that an explanation lists."""
ROUTING_STALE_S = 30.0
"""A cluster or link that nothing was heard of for so long is used only where nothing else serves."""

# Simulation
SIMULATED_RECORDS_MAX = 1 << 24
"""Blocks and states in one tier of a simulated cache, about 200 bytes each: 150 TB of a model with 17 KB a token at
blocks of 512 tokens."""

# Traces
TRACE_LINE_BYTES_MAX = 16 * MIB
"""One request of a trace: a million ids take about 10 MiB."""
TRACE_REQUESTS_MAX = 10_000_000
"""Requests of one trace."""
TRACE_IDS_MAX = 1 << 24
"""Different block ids of one trace, which are remembered to notice holes, about 150 bytes each."""
TRACE_SESSION_BYTES_MAX = 256 * MIB
"""One file of a trace with a file per session, unpacked."""
TRACE_SESSIONS_MAX = 100_000
"""Files of such a trace."""
TRACE_DEPTH_MAX = 8
"""Agents that agents have called."""
SESSION_CALLS_MAX = 100_000
"""Calls of one session, of a trace or generated."""
SESSION_KEY_BYTES_MAX = 1 << 30
"""Prefix keys of all calls of one session, which are in memory together."""

# Sweeps
SWEEP_POINTS_MAX = 4096
"""Simulations of one sweep."""
SWEEP_WORKERS_MAX = 256
"""Processes that simulate at once."""
SWEEP_POINT_DEADLINE_S = 24 * 3600.0
"""For one simulation of a sweep."""
SIMULATED_GOODPUT_TOLERANCE_MIN = 1e-3
"""How near a goodput may be asked for, as a share of it; each halving is a simulation, and seeds differ by more."""
SIMULATED_GOODPUT_DOUBLINGS_MAX = 4
"""Of the rate at which the search for a goodput begins, while it is good."""
SIMULATED_ATTEMPTS_MAX = 4
"""Times that a simulated prompt is routed whose prefill instance fails; then it is given up."""
SIMULATED_SAMPLES_MAX = 1 << 15
"""Of a simulation over time; when there are as many, every other one goes and the step doubles."""
SIMULATED_KEYS_MAX = 2_000_000
"""Blocks that the simulator remembers to say what an unbounded cache would give, some 250 MB; beyond, it says less."""
SIMULATED_DRAIN_S = 3600.0
"""Behind the last arrival a simulation goes on for ten times the span of arrivals and this long, at most."""

# vLLM
VLLM_LOAD_THREADS = 2
"""Of each worker: one copies into pages while another waits for records; saves find a lane to the pages free."""
VLLM_LOAD_DEADLINE_S = 30.0
"""For a load beside the steps, from its order on: the scheduler has brought the records to memory before. After it the
request is computed."""
VLLM_LAYERED_LOAD_DEADLINE_S = 5.0
"""For the loads of one step that are waited for within its forward, which all of its requests wait for."""
VLLM_SAVE_DEADLINE_S = 10.0
"""How long the saves of a step may keep the engine, all of them together; what is late is not saved."""
VLLM_JOINT_DEADLINE_S = 2.0
"""How long tensor-parallel ranks wait for one another. They run in step; one that does not come has lost the store, or
failed, and the save is given up."""

assert SPAN_BYTES_MAX <= RECORD_BYTES_MAX
assert RECORD_HEADER_BYTES_MAX % RECORD_ALIGN_BYTES == 0
assert RECORD_ALIGN_BYTES % FILE_ALIGN_BYTES == 0
assert FILE_PIECE_BYTES % FILE_ALIGN_BYTES == 0
assert FILE_DEPTH_DEFAULT <= FILE_DEPTH_MAX
assert FILE_BATCH_OPERATIONS_MAX <= FILE_OPERATIONS_MAX
assert JOURNAL_FRAME_BYTES_MAX % FILE_ALIGN_BYTES == 0
assert 2 * SSD_APPEND_ROWS_MAX <= FILE_BATCH_OPERATIONS_MAX
assert FRAME_HEADER_BYTES % 16 == 0
assert CREDIT_BYTES_DEFAULT >= 2 * FRAME_PAYLOAD_BYTES_MAX
assert VICTIMS_AHEAD_MIN <= VICTIMS_AHEAD
assert ATTACH_MESSAGE_BYTES_MAX >= 4 * PROMPT_TOKENS_MAX + HANDOVER_PAYLOAD_BYTES_MAX
assert FOREIGN_LOADS_MAX <= LOADS_MAX
assert TRANSFERS_PER_PEER_MAX <= TRANSFERS_PER_NODE_MAX
assert CONNECTIONS_PER_TRANSFER_MAX <= CONNECTIONS_PER_NODE_MAX
assert COPY_THREADS_DEFAULT <= COPY_THREADS_MAX
