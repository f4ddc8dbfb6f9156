"""What `kvstore doctor` finds out about kvstore's own parts: native code, transports, codecs, packages."""

from __future__ import annotations

import ctypes.util
import os
import socket
from importlib import metadata

from kvstore import registry
from kvstore.cli.finding import Finding
from kvstore.cli.machine import read_text
from kvstore.errors import KVStoreError
from kvstore.limits import COPY_THREADS_MAX, FILE_DEPTH_DEFAULT, FILE_PIECE_BYTES, FILE_URGENT_DEPTH
from kvstore.units import format_bytes

PACKAGES = {
    "torch": "pip install 'kvstore[torch]' to store and restore torch tensors on devices",
    "opentelemetry-api": "pip install 'kvstore[tracing]' and configure a provider for a span per transfer",
    "prometheus-client": "pip install 'kvstore[metrics]' for /metrics of kvstore serve, which answers 501 without",
    "triton": "comes with torch for CUDA; gathers an engine's pages on the device, which indexed copies do without",
    "transformers": "pip install 'kvstore[transformers]' for the adapter and specs from configurations",
}
"""Optional packages, and what for."""
NATIVE_PATHS: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {
    "crc32c": {
        "avx512": ("folding 256 bytes at a time", ("avx512f", "vpclmulqdq", "sse42", "pclmul")),
        "sse42": ("three streams of SSE4.2, joined by PCLMUL", ("sse42", "pclmul")),
        "portable": ("slicing by 8", ()),
    },
    "copy": {
        "avx512": ("memcpy; large copies by 64-byte non-temporal stores", ("avx512f",)),
        "avx2": ("memcpy; large copies by 32-byte non-temporal stores", ("avx2",)),
        "portable": ("memcpy", ()),
    },
}
"""Implementations of each native job from best to worst: what they are, and what of `cpu_features` they need."""
GATHERS = {
    "triton": "an engine's pages on CUDA, by one kernel",
    "native": "an engine's pages in host memory, by one native call",
    "index": "an engine's pages anywhere, by torch's indexed copies",
}
"""From best to worst."""
PINNED_PROBE_BYTES = 1 << 20
REQUIRED_PACKAGES = ("pyarrow", "numpy")
SOCKET_BUFFER_WANTED_BYTES = 16 << 20
"""Twice bandwidth x delay of 1 Gbit/s and 60 ms."""
CONGESTION_CONTROLS = ("cubic", "bbr")
"""One for short round trips, one for long and lossy ones."""


def part_findings() -> list[Finding]:
    return [
        *_native(),
        *_file_engines(),
        *_transports(),
        *_congestion_controls(),
        *_socket_buffers(),
        _pacing(),
        _zerocopy(),
        *_codecs(),
        *_packages(),
        *_gpu(),
    ]


def _native() -> list[Finding]:
    try:
        from kvstore._native import cpu_features
        from kvstore.record.threads import THREADS_ALLOWED
    except ImportError as error:
        return [Finding("native", False, str(error), is_demanded=True)]
    features = cpu_features()
    build = f"{features['compiler']}, {features['architecture']}, " + (
        "stable ABI" if features["stable_abi"] else "for this Python version only"
    )
    passes = "one pass" if features["copy_is_fused"] else "a stretch at a time: checksummed, then copied from the cache"
    can_stream = features["copy"] != "portable"
    streams = f"past the caches from {format_bytes(int(features['copy_stream_bytes']))} on"
    return [
        Finding("native", True, build, in_use=f"version {features['version']}"),
        *_paths("crc32c", features),
        *_paths("copy", features),
        Finding("copy.checksum", True, "copies with checksums", in_use=passes),
        Finding("copy.streaming", can_stream, "non-temporal stores", in_use=streams if can_stream else ""),
        Finding("copy.threads", True, f"1 to {COPY_THREADS_MAX}", in_use=f"up to {THREADS_ALLOWED} for large copies"),
    ]


def _paths(job: str, features: dict[str, str | bool | int]) -> list[Finding]:
    """Every path of one job, from best to worst."""
    used = str(features[job])
    forced = os.environ.get(f"KVSTORE_{job.upper()}", "")
    findings = []
    is_worse = False
    for name, (offered, needs) in NATIVE_PATHS[job].items():
        missing = [feature for feature in needs if not features[feature]]
        why = ""
        if missing:
            why = f"this CPU has no {', '.join(missing)}"
        elif name != used:
            why = f"{used} is faster" if is_worse else str(features[f"{job}_why_not_better"])
        findings.append(
            Finding(
                f"{job}.{name}",
                not missing,
                offered,
                in_use="yes" if name == used else "",
                why_not_better=why,
                is_demanded=forced == name,
            )
        )
        is_worse = is_worse or name == used
    return findings


FILE_ENGINES = {
    "io_uring": "reads and writes of an SSD tier by io_uring, driven by one thread",
    "threads": "reads and writes of an SSD tier by pread and pwrite, each in a thread",
}


def _file_engines() -> list[Finding]:
    """Every engine of file I/O, from best to worst."""
    try:
        from kvstore._native import file_engines
        from kvstore.tiers.ssd.engine import choose_engine
    except ImportError:
        return []  # the finding `native` says why
    forced = os.environ.get("KVSTORE_IO", "")
    depth = f"{FILE_DEPTH_DEFAULT} at once, {FILE_URGENT_DEPTH} more if urgent, of {format_bytes(FILE_PIECE_BYTES)}"
    try:
        choice = choose_engine()
    except KVStoreError as error:
        return [Finding(f"io.{forced}", False, "", why_not_better=str(error), is_demanded=True)]
    return [
        Finding(
            f"io.{name}",
            not missing,
            FILE_ENGINES[name],
            in_use=depth if name == choice.name else "",
            why_not_better=missing or ("" if name == choice.name else choice.why_not_better or "io_uring can be used"),
            is_demanded=forced == name,
        )
        for name, missing in file_engines(FILE_DEPTH_DEFAULT + FILE_URGENT_DEPTH)
    ]


def _transports() -> list[Finding]:
    findings = []
    for scheme, transport in registry.available_transports().items():
        availability = transport.availability()
        findings.append(
            Finding(
                f"transport.{scheme}",
                availability.is_available,
                availability.detail if availability.is_available else "",
                in_use=f"for {scheme}:// addresses" if availability.is_available else "",
                why_not_better="" if availability.is_available else availability.detail,
            )
        )
    if not any(finding.name == "transport.ucx" for finding in findings):
        library = ctypes.util.find_library("ucp")
        findings.append(
            Finding(
                "transport.ucx",
                False,
                f"the system has {library}" if library else "no libucp on the system's library path",
                why_not_better="this version has no UCX transport, so no RDMA; use tcp://",
            )
        )
    return findings


def _congestion_controls() -> list[Finding]:
    """Which algorithms a connection of this process may choose; the kernel's own list does not say."""
    from kvstore.transfer.path import FAR_CONGESTION_CONTROL, NEAR_CONGESTION_CONTROL, NEAR_ROUND_TRIP_S
    from transports.tcp.socket_options import choosable_congestion_controls, congestion_controls

    findings = []
    choosable = choosable_congestion_controls()
    limit = f"{NEAR_ROUND_TRIP_S * 1000:g} ms"
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        name_bytes_max = 16  # TCP_CA_NAME_MAX of linux/tcp.h
        default = probe.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name_bytes_max).rstrip(b"\0").decode()
        for name in dict.fromkeys((default, *congestion_controls(), *CONGESTION_CONTROLS)):
            uses = []
            if name == (NEAR_CONGESTION_CONTROL if NEAR_CONGESTION_CONTROL in choosable else default):
                uses.append(f"round trips below {limit}")
            if name == (FAR_CONGESTION_CONTROL if FAR_CONGESTION_CONTROL in choosable else default):
                uses.append(f"round trips of {limit} and more")
            if name == default:
                uses.append("paced connections")
            use, why = f"by tcp:// for {' and '.join(uses)}" if uses else "on request", ""
            try:
                probe.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())
            except PermissionError:
                use, why = "", "needs root, or net.ipv4.tcp_allowed_congestion_control extended"
            except OSError:
                use, why = "", f"the kernel does not have it; as root: modprobe tcp_{name}"
            findings.append(Finding(f"congestion.{name}", not why, "TCP congestion control", use, why))
    return findings


def _socket_buffers() -> list[Finding]:
    """How far the kernel may grow a connection's buffers by itself; bandwidth x delay beyond it is not reached."""
    findings = []
    for name, buffered in (("tcp_rmem", "received"), ("tcp_wmem", "sent")):
        fields = read_text(f"/proc/sys/net/ipv4/{name}").split()
        if len(fields) != 3:
            continue
        most_bytes = int(fields[2])
        is_low = most_bytes < SOCKET_BUFFER_WANTED_BYTES
        # Half of it is room for what was lost and comes again.
        reached = f"{most_bytes / 2 * 8 / 0.1 / 1e6:.0f} Mbit/s at 100 ms"
        findings.append(
            Finding(
                f"tcp.{name}",
                not is_low,
                f"up to {format_bytes(most_bytes)} {buffered} per connection, enough for about {reached}",
                in_use="grown by the kernel as the path needs it" if not is_low else "",
                why_not_better=f"for fast long paths raise the third number of net.ipv4.{name}" if is_low else "",
            )
        )
    return findings


def _zerocopy() -> Finding:
    return Finding(
        "tcp.zerocopy",
        False,
        "MSG_ZEROCOPY of the kernel" if hasattr(socket, "MSG_ERRQUEUE") else "unknown",
        why_not_better="not used: it was never seen to pay where no network card is; pieces are copied into the kernel",
    )


def _pacing() -> Finding:
    from transports.tcp.socket_options import SO_MAX_PACING_RATE

    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, 1 << 20)
    except OSError as error:
        return Finding("pacing", False, f"SO_MAX_PACING_RATE is refused: {error.strerror}")
    return Finding("pacing", True, "SO_MAX_PACING_RATE, without root", in_use="where TransportOptions ask for it")


def _codecs() -> list[Finding]:
    names = {*registry.BUILT_IN[registry.CODEC_GROUP]}
    names.update(entry_point.name for entry_point in metadata.entry_points(group=registry.CODEC_GROUP))
    findings = []
    for name in sorted(names):
        try:
            codec = registry.codec_for(name)
        except KVStoreError as error:
            findings.append(Finding(f"codec.{name}", False, "", why_not_better=str(error)))
            continue
        in_use = "every record" if name == "raw" else ""
        findings.append(Finding(f"codec.{name}", True, "lossy" if codec.is_lossy else "lossless", in_use=in_use))
    return findings


def _packages() -> list[Finding]:
    findings = []
    for name in (*REQUIRED_PACKAGES, *PACKAGES):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            findings.append(Finding(f"package.{name}", False, "not installed", why_not_better=PACKAGES.get(name, "")))
            continue
        findings.append(Finding(f"package.{name}", True, version, in_use="" if name in PACKAGES else "yes"))
    return findings


def _cuda() -> Finding:
    without = "pip install 'kvstore[torch]' where there is a GPU; without, records stay in host memory and on disks"
    try:
        import torch
    except ImportError:
        return Finding("cuda", False, "unknown: torch is not installed", why_not_better=without)
    except Exception as error:  # a broken installation fails in its own ways
        return Finding(
            "cuda", False, f"torch cannot be imported: {type(error).__name__}: {error}", why_not_better=without
        )
    if not torch.cuda.is_available():
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        why = "see nvidia-smi" if torch.version.cuda else "install a torch that is built for CUDA if there is a GPU"
        return Finding("cuda", False, f"no device; torch is {build}", why_not_better=why)
    devices = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    return Finding(
        "cuda", True, f"CUDA {torch.version.cuda}: {devices}", in_use="what gpu= says; tensors of put, copy_to"
    )


def _gpu() -> list[Finding]:
    """What a tier in device memory would use."""
    cuda = _cuda()
    if not cuda.is_available:
        why = f"{cuda.offered}; device='cpu' tries it on the host"
        return [
            cuda,
            Finding("gpu", False, "records in device memory, or in an engine's pages", why_not_better=why),
            Finding("gpu.pinned", False, "arena page-locked for copies beside the host", why_not_better=cuda.offered),
            *_gathers("cpu"),
        ]
    return [
        cuda,
        Finding("gpu", True, "records in device memory, or in an engine's pages", in_use="with gpu="),
        _pinned(),
        *_gathers("cuda"),
    ]


def _pinned() -> Finding:
    """Whether shared memory, such as an arena's, can be page-locked: tried with a little of it."""
    from kvstore.tiers import ArenaTier
    from kvstore.tiers.gpu.torch_device import open_device

    offered = "arena page-locked for copies beside the host"
    try:
        device = open_device("cuda")
        arena = ArenaTier(PINNED_PROBE_BYTES, name=None)
        try:
            pinning = device.pin(arena.memory)
            if pinning.is_pinned:
                device.unpin(arena.memory)
        finally:
            arena.close()
    except Exception as error:  # a broken driver fails in its own ways
        return Finding("gpu.pinned", False, offered, why_not_better=f"{type(error).__name__}: {error}")
    why = "" if pinning.is_pinned else f"{pinning.why_not}; records go through staging buffers"
    return Finding("gpu.pinned", pinning.is_pinned, offered, "yes" if pinning.is_pinned else "", why)


def _gathers(device_type: str) -> list[Finding]:
    """Ways to gather an engine's pages, from best to worst, where the tensors would lie."""
    try:
        from kvstore.tiers.gpu.pages import GATHER_VARIABLE, choose_gather, why_no_gather
    except ImportError:
        return []  # the finding `native` says why
    forced = os.environ.get(GATHER_VARIABLE, "")
    try:
        used, why_not_better = choose_gather(device_type)
    except KVStoreError as error:
        return [Finding(f"gather.{forced}", False, "", why_not_better=str(error), is_demanded=True)]
    findings = []
    for name, offered in GATHERS.items():
        missing = why_no_gather(name, device_type)
        is_used = name == used.name
        why = missing or ("" if is_used else why_not_better or f"{used.name} is faster")
        in_use = f"pages on {device_type}" if is_used else ""
        findings.append(Finding(f"gather.{name}", not missing, offered, in_use, why, is_demanded=forced == name))
    return findings
