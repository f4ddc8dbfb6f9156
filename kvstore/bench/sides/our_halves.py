"""Both ends of our own transfers. Apart from `ours`, so that processes of other sides need not load a store."""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from kvstore.abc import TransportOptions
from kvstore.bench.sides.side import Half, ReceivingHalf, SendingHalf, Told
from kvstore.clock import Deadline
from kvstore.errors import BenchmarkError
from kvstore.spec import ReuseRule
from kvstore.store import open_store
from kvstore.transfer import Endpoint, Sender, TransferSettings, send_lease

if TYPE_CHECKING:
    from kvstore.bench.load import Load
    from kvstore.pool import Prompt
    from kvstore.spec import TensorSpec
    from kvstore.store import Store

PUT_TOKENS = 4096
"""Tokens that are filled at once; what they take is not part of the memory that is asked for."""
EVICT_DEADLINE_S = 30.0
EVICT_PAUSE_S = 0.002


class _OurHalf(Half):
    def __init__(self, load: Load) -> None:
        self.load = load
        self.store: Store = open_store(load.spec, dram=load.pool_bytes)
        ids = np.arange(load.tokens + 1, dtype=np.uint32)
        salts = [f"batch {batch}".encode() for batch in range(load.batches)]
        # A match covers one token less than it is asked for.
        self.asked: list[Prompt] = [self.store.prompt(ids, salt=salt) for salt in salts]
        self.prompts: list[Prompt] = [self.store.prompt(ids[:-1], salt=salt) for salt in salts]

    @property
    def options(self) -> TransportOptions:
        return TransportOptions(
            pacing_bytes_per_s=self.load.pacing_bytes_per_s or None, congestion_control=self.load.congestion or None
        )

    @property
    def settings(self) -> TransferSettings:
        return TransferSettings(connections=self.load.connections) if self.load.connections else TransferSettings()

    def digest(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for asked in self.asked:
            with self.store.read(self.store.match(asked)) as lease:
                for layer in lease:
                    for name in layer.names:
                        digest.update(layer.read(name).view(np.uint8).data)
        return digest.hexdigest()

    def close(self) -> None:
        self.store.close()


class OurReceiver(_OurHalf, ReceivingHalf):
    def __init__(self, load: Load) -> None:
        super().__init__(load)
        host = f"[{load.host}]" if ":" in load.host else load.host
        self._endpoint = Endpoint(self.store.pool, f"tcp://{host}:0", transport=self.options, settings=self.settings)

    def tell(self) -> Told:
        return {"address": self._endpoint.address}

    def make_room(self) -> None:
        for asked in self.asked:
            found = self.store.match(asked).tokens
            if found != self.load.tokens:
                raise BenchmarkError(f"{found} of {self.load.tokens} tokens have arrived and are a resume point")
        self.clear()

    def clear(self) -> None:
        deadline = Deadline.after(EVICT_DEADLINE_S)
        for asked, prompt in zip(self.asked, self.prompts, strict=True):
            while self.store.match(asked).tokens:
                deadline.check("the last transfer to let go of its records")
                # A slot that a transfer's thread has not let go of stays for a moment.
                self.store.pool.evict(prompt.path.keys[0])
                if self.store.match(asked).tokens:
                    time.sleep(EVICT_PAUSE_S)

    def close(self) -> None:
        self._endpoint.close()
        super().close()


class OurSender(_OurHalf, SendingHalf):
    def __init__(self, load: Load) -> None:
        super().__init__(load)
        self._sender = Sender(settings=self.settings)
        self._target = ""
        generator = np.random.default_rng(load.seed)
        for prompt in self.prompts:
            _write(self.store, prompt, generator)
        self._matches = [self.store.match(asked) for asked in self.asked]

    def hear(self, told: Told) -> None:
        self._target = str(told["address"])

    def send(self, batch: int) -> float:
        begin = time.perf_counter()
        lease = self.store.read(self._matches[batch])
        done = send_lease(lease, self._target, transport=self.options, sender=self._sender).result(self.load.deadline_s)
        seconds = time.perf_counter() - begin
        if done.total_bytes != self.load.total_bytes:
            raise BenchmarkError(
                f"{done.total_bytes} of {self.load.total_bytes} bytes crossed; the rest was at the receiver already"
            )
        return seconds

    def close(self) -> None:
        self._sender.close()
        super().close()


def _write(store: Store, prompt: Prompt, generator: np.random.Generator) -> None:
    """Store a prompt's cache of random bytes."""
    tokens = len(prompt)
    with store.write(prompt, resume_at=(tokens,)) as writer:
        for group in store.spec.groups:
            for layer in group.layers:
                if group.rule is ReuseRule.ATTENTION:
                    for start in range(0, tokens, PUT_TOKENS):
                        stop = min(tokens, start + PUT_TOKENS)
                        put = _noise(group.tensors, stop - start, generator)
                        writer.put(layer, tokens=slice(start, stop), **put)
                else:
                    valid = group.valid_tokens(store.spec.block_tokens, tokens)
                    writer.put_state(layer, at=tokens, **_noise(group.tensors, valid, generator))
        writer.commit()


def _noise(tensors: tuple[TensorSpec, ...], tokens: int, generator: np.random.Generator) -> dict[str, Any]:
    return {
        tensor.name: np.frombuffer(generator.bytes(tensor.nbytes(tokens)), tensor.dtype.storage).reshape(
            tensor.shape(tensor.rows, tokens)
        )
        for tensor in tensors
    }
