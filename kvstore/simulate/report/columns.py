"""Results as Arrow tables: a row per request, a row per sample; and their schemas, each column with its meaning."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from kvstore.simulate.result import PARTS, SAMPLED_BY_CLUSTER, Outcome

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from kvstore.simulate.result import SimulationResult

TABLES_VERSION = 1
"""Of the schemas; a column that is renamed or changes its meaning makes a new one, an added one does not."""

REQUEST_COLUMNS: dict[str, str] = {
    "number": "from 0, in the order of the workload",
    "arrival_s": "since the start; empty for a later turn that never came",
    "is_measured": "whether it arrived after the warm-up",
    "prompt_tokens": "all of them",
    "output_tokens": "that were asked for, the first one included",
    "cached_tokens": "length that prefill began at",
    "possible_tokens": "the longest prefix that had come before, in any cluster",
    "tier": "where the prefix came from; empty for none",
    "prefill": "cluster that prefilled; empty for none",
    "decode": "cluster that decoded; empty for none",
    "outcome": "`pending` (cut off), `done`, `rejected` or `failed`",
    "is_good": "whether it met both limits of the SLO",
    "queue_s": "waited for an instance that prefills",
    "load_s": "loaded its prefix from a slower tier",
    "prefix_s": "moved its prefix from another cluster",
    "prefill_s": "prefilled",
    "transfer_s": "waited for the rest of its cache after prefill had ended",
    "decode_wait_s": "waited for a place in a decode batch",
    "ttft_s": "time to first token: the six before, added",
    "tpot_s": "time per output token after the first; empty for one that has only one",
    "finished_s": "end, since the start",
    "prefix_bytes": "that crossed a link for its prefix",
    "handover_bytes": "that crossed a link for its hand-over",
}

SAMPLE_COLUMNS: dict[str, str] = {
    "at_s": "end of the sample, since the start",
    "prefill_waiting:CLUSTER": "prompts that wait for an instance, and for nothing else",
    "prefill_busy:CLUSTER": "instances that prefill",
    "prefill_instances:CLUSTER": "instances that could; one that is to change its role until its prompt ends",
    "decode_running:CLUSTER": "requests that are being decoded",
    "decode_waiting:CLUSTER": "requests that are there with their cache, and wait for a place in a batch",
    "decode_instances:CLUSTER": "instances that decode; one that is to change its role until its requests end",
    "link_bytes:SOURCE>TARGET": "delivered since the sample before",
    "link_capacity_bytes_per_s:SOURCE>TARGET": "what the link could carry",
    "policy:NAME": "a number that the policy remembers",
}


def requests_table(result: SimulationResult) -> pa.Table:
    """The requests of a run; `REQUEST_COLUMNS` says what each column means. What did not come to pass is null."""
    from kvstore.simulate.report.measured import good_and_decided, measured

    table = result.requests
    clusters = [cluster.name for cluster in result.scenario.deployment.clusters]
    is_good, _ = good_and_decided(result)
    columns: dict[str, pa.Array] = {
        "number": pa.array(np.arange(len(table))),
        "arrival_s": _numbers(table.arrival_s),
        "is_measured": pa.array(measured(result).requests),
        "prompt_tokens": pa.array(table.prompt_tokens),
        "output_tokens": pa.array(table.output_tokens),
        "cached_tokens": pa.array(table.cached_tokens),
        "possible_tokens": pa.array(table.possible_tokens),
        "tier": _names(table.tier, result.tiers),
        "prefill": _names(table.prefill, clusters),
        "decode": _names(table.decode, clusters),
        "outcome": _names(table.outcome, [outcome.name.lower() for outcome in Outcome]),
        "is_good": pa.array(is_good),
        **{part: _numbers(table.parts[:, number]) for number, part in enumerate(PARTS)},
        "ttft_s": _numbers(table.ttft_s),
        "tpot_s": _numbers(table.tpot_s),
        "finished_s": _numbers(table.finished_s),
        "prefix_bytes": _numbers(table.prefix_bytes),
        "handover_bytes": _numbers(table.handover_bytes),
    }
    return _with_meaning(columns, REQUEST_COLUMNS, result)


def samples_table(result: SimulationResult) -> pa.Table:
    """The samples of a run; `SAMPLE_COLUMNS` says what each column means."""
    samples = result.samples
    columns: dict[str, pa.Array] = {"at_s": _numbers(samples.at_s)}
    for name in SAMPLED_BY_CLUSTER:
        by_cluster: Mapping[str, NDArray[np.float64]] = getattr(samples, name)
        columns |= {f"{name}:{cluster}": _numbers(values) for cluster, values in by_cluster.items()}
    for name in ("link_bytes", "link_capacity_bytes_per_s"):
        by_link: Mapping[tuple[str, str], NDArray[np.float64]] = getattr(samples, name)
        columns |= {f"{name}:{source}>{target}": _numbers(values) for (source, target), values in by_link.items()}
    columns |= {f"policy:{name}": _numbers(values) for name, values in samples.policy.items()}
    meanings = {column.partition(":")[0]: meaning for column, meaning in SAMPLE_COLUMNS.items()}
    return _with_meaning(columns, {name: meanings[name.partition(":")[0]] for name in columns}, result)


def _numbers(values: NDArray[np.float64]) -> pa.Array:
    return pa.array(values, mask=~np.isfinite(values))


def _names(numbers: NDArray[np.int8] | NDArray[np.int16], names: Sequence[str]) -> pa.Array:
    indices = pa.array(numbers.astype(np.int32), mask=numbers < 0)
    return pa.DictionaryArray.from_arrays(indices, pa.array(list(names), pa.string()))


def _with_meaning(columns: dict[str, pa.Array], meanings: Mapping[str, str], result: SimulationResult) -> pa.Table:
    fields = [pa.field(name, column.type, metadata={"meaning": meanings[name]}) for name, column in columns.items()]
    metadata = {
        "kvstore.simulation.tables": str(TABLES_VERSION),
        "kvstore.simulation.scenario": result.scenario.name,
        "kvstore.simulation.policy": result.scenario.policy.name,
        "kvstore.simulation.seed": str(result.scenario.seed),
        "kvstore.simulation.is_stable": str(result.is_stable).lower(),
    }
    return pa.Table.from_arrays(list(columns.values()), schema=pa.schema(fields, metadata=metadata))
