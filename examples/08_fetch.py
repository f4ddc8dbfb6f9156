"""One node has a prefix, another asks and pulls it: `python examples/08_fetch.py`.

Both stores live in this process; between machines nothing changes but the address. What is refused is shown too: a node
that was not told to answer, and a tenant that does not present the salt.
"""

from __future__ import annotations

import asyncio

import numpy as np

import kvstore
from kvstore.errors import TransferError
from kvstore.spec import CacheGroup, DType, ReuseRule, Segment, TensorSpec

HEADS, DIM, BLOCK_TOKENS, TOKENS = 2, 64, 16, 256
LAYER = 0
DEADLINE_S = 30.0

heads = (Segment("heads", units=HEADS, unit_rows=1),)
attention = CacheGroup(
    "attention",
    ReuseRule.ATTENTION,
    layers=(LAYER,),
    tensors=tuple(TensorSpec(name, DType.FLOAT32, heads, (DIM,), has_tokens=True) for name in ("keys", "values")),
)
spec = kvstore.ModelSpec("example", weights="seed 0", block_tokens=BLOCK_TOKENS, groups=(attention,))

system_prompt = list(range(TOKENS))
request = [*system_prompt, 7, 7, 7]
random = np.random.default_rng(0)
keys, values = (random.standard_normal((HEADS, TOKENS, DIM), np.float32) for _ in range(2))  # [heads, tokens, dim]

with kvstore.open(spec, dram="8MiB") as a, kvstore.open(spec, dram="8MiB") as b:
    with a.write(system_prompt, salt=b"tenant-7") as writer:
        writer.put(LAYER, tokens=slice(0, TOKENS), keys=keys, values=values)
        writer.commit()
    address = a.listen("tcp://127.0.0.1:0", serves=True).address  # reading is another right than sending

    found = b.query(request, address, salt=b"tenant-7")
    print(f"the other node has {found.tokens} of {len(request)} tokens, {found.size_bytes} bytes in {found.tier}")
    print(f"without the salt it has {b.query(request, address).tokens}")

    report = b.fetch(found).result(DEADLINE_S)  # committed here when this returns
    print(f"fetched {report.tokens} tokens in {report.received_bytes} bytes")
    match = b.match(request, salt=b"tenant-7")
    with b.read(match, verify=True) as lease:
        assert np.array_equal(lease.layer(LAYER).read("keys"), keys)
    print(f"the prompt resumes at {match.tokens} tokens, bit for bit")

    async def router() -> int:
        """Everything that waits can be awaited; what is here already is not fetched again."""
        again = await b.fetch(request, address, salt=b"tenant-7")
        return again.received_bytes

    print(f"a second fetch moves {asyncio.run(router())} bytes")

    silent = a.listen("tcp://127.0.0.1:0").address
    try:
        b.query(request, silent, salt=b"tenant-7")
    except TransferError as error:
        print(f"refused: {error}")
