"""Records as arrays say the same as records one by one."""

from __future__ import annotations

import numpy as np
import pytest

import kvstore
from kvstore.pool import HeldRecord, RecordArrays, RecordDigests, RecordName, TransactionRecord
from kvstore.pool.plan import name_table
from kvstore.pool.rows import RecordNames
from kvstore.record import Record
from kvstore.spec import UnitRange
from kvstore.testing.specs import hybrid

SPEC = hybrid()
IDS = list(range(3 * SPEC.block_tokens + 1))


def records_of(arrays: RecordArrays) -> list[tuple[RecordName, object, int, int, bytes, int]]:
    return [
        (name, arrays.layout(number), end_tokens, valid_tokens, arrays.digests[digest], cost_us)
        for number, (name, end_tokens, valid_tokens, digest, cost_us) in enumerate(
            zip(
                arrays.names,
                arrays.end_tokens.tolist(),
                arrays.valid_tokens.tolist(),
                arrays.digest_numbers.tolist(),
                arrays.costs_us.tolist(),
                strict=True,
            )
        )
    ]


def expected(
    records: tuple[HeldRecord, ...] | tuple[TransactionRecord, ...],
) -> list[tuple[RecordName, object, int, int, bytes, int]]:
    return [
        (r.name, r.layout, r.header.end_tokens, r.header.valid_tokens, r.header.grid, r.header.cost_us) for r in records
    ]


def test_a_transactions_arrays_are_its_records() -> None:
    with kvstore.open(SPEC, dram="16MiB") as store, store.write(IDS, resume_at=(2 * SPEC.block_tokens,)) as writer:
        transaction = writer.transaction
        arrays, addresses = transaction.reserved_arrays
        assert records_of(arrays) == expected(transaction.records)
        assert len({record.layout for record in transaction.records}) > 1
        assert addresses.tolist() == [np.frombuffer(r.memory, np.uint8).ctypes.data for r in transaction.records]
        one_by_one = RecordArrays.of((r.name, r.layout, r.header) for r in transaction.records)
        assert records_of(one_by_one) == records_of(arrays)
        order = np.arange(len(arrays))[::-1]
        assert records_of(arrays.taken(order)) == records_of(arrays)[::-1]
        assert arrays.names.positions_of(arrays.taken(order[:3]).names).tolist() == order[:3].tolist()


def test_no_records_are_empty_arrays() -> None:
    assert len(RecordArrays.of([])) == 0


def test_many_records_are_framed_at_once_as_they_are_one_by_one() -> None:
    with kvstore.open(SPEC, dram="16MiB") as store, store.write(IDS, resume_at=(2 * SPEC.block_tokens,)) as writer:
        transaction = writer.transaction
        costs = [index + 1 for index in range(len(transaction.records))]
        costs[-1] = 10**17
        for record in transaction.records:
            record.memory[:] = bytes(len(record.memory))
        transaction.seal_all(range(len(costs)), costs)
        transaction.seal(0, 99)
        for record, cost_us in zip(transaction.records, costs, strict=True):
            header = Record(record.layout, record.memory).header()
            assert (header.key, header.parent, header.grid) == (
                record.header.key, record.header.parent, record.header.grid,
            )  # fmt: skip
            assert (header.end_tokens, header.valid_tokens) == (record.header.end_tokens, record.header.valid_tokens)
            assert header.cost_us == min(cost_us, 10**16 - 1)


def test_digests_by_position_are_those_by_name() -> None:
    names = RecordNames.of([RecordName(node, 0, 0, UnitRange(0, 1)) for node in range(4)])
    first, second, unused = bytes([1]) * 32, bytes([2]) * 32, bytes([3]) * 32
    digests = RecordDigests(names, np.array([3, 1, 0, 1]), [first, second, unused, first])
    assert dict(digests) == dict(zip(names, [first, second, first, second], strict=True))
    with kvstore.open(SPEC, dram="16MiB") as store, store.write(IDS, resume_at=(2 * SPEC.block_tokens,)) as writer:
        path = writer.transaction.path
    by_position, by_name = (name_table(SPEC, path, names, None, each) for each in (digests, dict(digests)))
    for table, known in (by_position, by_name):
        assert [known[32 * number :][:32] for number in table[:, 5].astype(int)] == [first, second, first, second]
        assert unused not in known
        assert len(known) == 64
    with pytest.raises(KeyError):
        digests[RecordName(9, 0, 0, UnitRange(0, 1))]
