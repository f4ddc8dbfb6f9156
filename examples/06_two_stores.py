"""A prefix goes from one store to another over TCP: `python examples/06_two_stores.py`.

The spec is written by hand and the cache is NumPy arrays: one layer with attention, one with a recurrent state. Both
stores live in this process; between machines nothing changes but the address. What fails is shown too: nobody listens.
"""

from __future__ import annotations

import numpy as np

import kvstore
from kvstore.errors import PeerGoneError
from kvstore.spec import CacheGroup, DType, ReuseRule, Segment, TensorSpec

HEADS, DIM, BLOCK_TOKENS, TOKENS = 2, 64, 16, 40
ATTENTION_LAYER, STATE_LAYER = 0, 1
DEADLINE_S = 30.0

heads = (Segment("heads", units=HEADS, unit_rows=1),)  # what tensor-parallel workers split
attention = CacheGroup(
    "attention",
    ReuseRule.ATTENTION,
    layers=(ATTENTION_LAYER,),
    tensors=tuple(TensorSpec(name, DType.FLOAT32, heads, (DIM,), has_tokens=True) for name in ("keys", "values")),
)
state = CacheGroup(
    "state",
    ReuseRule.STATE,
    layers=(STATE_LAYER,),
    tensors=(TensorSpec("recurrent", DType.FLOAT32, heads, (DIM, DIM), has_tokens=False),),
)
spec = kvstore.ModelSpec("example", weights="seed 0", block_tokens=BLOCK_TOKENS, groups=(attention, state))

token_ids = list(range(TOKENS))
random = np.random.default_rng(0)
keys, values = (random.standard_normal((HEADS, TOKENS, DIM), np.float32) for _ in range(2))  # [heads, tokens, dim]
recurrent = random.standard_normal((HEADS, DIM, DIM), np.float32)  # after all 40 tokens

with kvstore.open(spec, dram="4MiB") as here, kvstore.open(spec, dram="4MiB") as there:
    address = there.listen("tcp://127.0.0.1:0").address  # port 0: the system chooses
    with here.write(token_ids) as writer:
        sent = writer.send(address)  # before the first put: pieces leave as they become whole
        writer.put(ATTENTION_LAYER, tokens=slice(0, TOKENS), keys=keys, values=values)
        writer.put_state(STATE_LAYER, at=TOKENS, recurrent=recurrent)
        writer.commit()
    report = sent.result(DEADLINE_S)  # the other store has committed it, too
    print(f"{report.total_bytes} bytes of {report.tokens} tokens went to {address}")

    match = there.match([*token_ids, 40])  # at most one token less than the prompt has can match
    with there.read(match, verify=True) as lease:
        cache = np.empty((HEADS, TOKENS, DIM), np.float32)
        lease.layer(ATTENTION_LAYER).copy_to(keys=cache)
        assert np.array_equal(cache, keys)
        assert np.array_equal(lease.layer(STATE_LAYER).read("recurrent"), recurrent)
    print(f"the other store resumes at {match.tokens} tokens, bit for bit")

    shorter = there.match(token_ids[:30])
    print(f"a prompt of 30 tokens resumes at {shorter.tokens}: {', '.join(map(str, shorter.missing.reasons))}")

    try:
        here.send(here.match([*token_ids, 40]), "tcp://127.0.0.1:1").result(DEADLINE_S)
    except PeerGoneError as error:
        print(f"a transfer to nobody fails: {error}")
