"""A hand-over is read from the very records that were handed over, whatever else the receiver has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from kvstore.pool import HandOver
from kvstore.spec import ChunkGrid
from kvstore.store import open_store
from kvstore.testing.specs import dense

if TYPE_CHECKING:
    from kvstore.store import Writer

B = 16
IDS = list(range(100, 140))


def put_constant(writer: Writer, tokens: int, value: int) -> None:
    for group in dense(B).groups:
        for layer in group.layers:
            tensors = {
                tensor.name: np.full(tensor.shape(tensor.rows, tokens), value).astype(tensor.dtype.storage)
                for tensor in group.tensors
            }
            writer.put(layer, tokens=slice(0, tokens), **tensors)


@pytest.mark.parametrize("earlier", [ChunkGrid((24, 32)), None], ids=["other chunks", "unknown chunks"])
def test_what_was_computed_otherwise_does_not_mix_in(earlier: ChunkGrid | None) -> None:
    spec = dense(B)
    with open_store(spec, dram="2MiB") as sender, open_store(spec, dram="2MiB") as receiver:
        with receiver.write(IDS[:32], grid=earlier) as writer:
            put_constant(writer, 32, 1)
            writer.commit()
        endpoint = receiver.listen("memory://handover-records")
        with sender.write(IDS, grid=ChunkGrid.every(16, upto=len(IDS))) as writer:
            transfer = writer.send(endpoint.address, is_transient=True)
            put_constant(writer, len(IDS), 2)
            writer.commit(handover=HandOver(7))
        transfer.result(30.0)
        arrival = receiver.accept(IDS).result(30.0)
        with receiver.read(arrival.match) as lease:
            for view in lease:
                for name in view.names:
                    assert (view.read(name) == 2).all(), f"{name} of layer {view.number} is not what was handed over"
        receiver.pool.check()
