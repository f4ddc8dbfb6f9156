"""A Mamba-2 decode state in JAX, saved and resumed exactly: `python examples/14_jax_mamba2.py`.

Needs `pip install 'kvstore[jax]'`. The cache is kept as JAX ports of Mamba-2 keep it: for each layer `conv`
[1, channels, kernel - 1] and `ssm` [1, heads, head dimension, state size], replaced and never changed in place. A
prefill stores the state; whoever has a prompt that begins alike finds it and decodes on: the same logits, bit for bit.
A lost state gives others, which is shown too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

import kvstore
from kvstore.adapters import jax as kvstore_jax

if TYPE_CHECKING:
    from collections.abc import Sequence

LAYERS, HIDDEN, HEADS, HEAD_DIM, STATE, KERNEL, VOCABULARY = 3, 64, 8, 16, 32, 4, 512
INNER = HEADS * HEAD_DIM
CHANNELS = INNER + 2 * STATE
PROMPT = [(7 * number * number + 3) % VOCABULARY for number in range(150)]
NEW_TOKENS = 12


class Mamba2Cache(NamedTuple):
    conv: tuple[jax.Array, ...]
    ssm: tuple[jax.Array, ...]


def empty_cache() -> Mamba2Cache:
    conv = tuple(jnp.zeros((1, CHANNELS, KERNEL - 1), jnp.bfloat16) for _ in range(LAYERS))
    return Mamba2Cache(conv, tuple(jnp.zeros((1, HEADS, HEAD_DIM, STATE), jnp.float32) for _ in range(LAYERS)))


def make_weights(seed: int) -> list[dict[str, jax.Array]]:
    """Random, and large enough that a lost state changes what is decoded."""
    keys = jax.random.split(jax.random.key(seed), LAYERS + 1)
    shapes = {"enter": (HIDDEN, INNER + CHANNELS + HEADS), "kernel": (CHANNELS, KERNEL), "leave": (INNER, HIDDEN)}
    weights: list[dict[str, jax.Array]] = [{"embed": jax.random.normal(keys[-1], (VOCABULARY, HIDDEN))}]
    for key in keys[:-1]:
        parts = jax.random.split(key, len(shapes))
        named = zip(shapes.items(), parts, strict=True)
        weights.append({name: jax.random.normal(part, shape) * 0.25 for (name, shape), part in named})
    return weights


def mix(layer: dict[str, jax.Array], x: jax.Array, conv: jax.Array, ssm: jax.Array) -> tuple[jax.Array, ...]:
    """One token through one layer: the recurrence of Mamba-2 (Dao and Gu, 2024), with a group for all heads."""
    gate, channels, step = jnp.split(x @ layer["enter"], [INNER, INNER + CHANNELS])
    window = jnp.concatenate([conv[0], channels.astype(conv.dtype)[:, None]], axis=1)
    mixed = jax.nn.silu((window.astype(jnp.float32) * layer["kernel"]).sum(axis=1))
    value, into, out = jnp.split(mixed, [INNER, INNER + STATE])
    step = jax.nn.softplus(step - 2.0)
    decay = jnp.exp(-step)[:, None, None]
    value = value.reshape(HEADS, HEAD_DIM)
    ssm = ssm * decay + (value * step[:, None])[:, :, None] * into
    y = (ssm[0] @ out + value).reshape(INNER) * jax.nn.silu(gate)
    return x + y @ layer["leave"], window[None, :, 1:], ssm


@jax.jit  # type: ignore[untyped-decorator]
def step(weights: list[dict[str, jax.Array]], token: jax.Array, cache: Mamba2Cache) -> tuple[jax.Array, Mamba2Cache]:
    """Logits after one more token, and the cache that includes it."""
    x = weights[0]["embed"][token]
    conv, ssm = [], []
    for layer, conv_state, ssm_state in zip(weights[1:], cache.conv, cache.ssm, strict=True):
        x = x / jnp.sqrt(jnp.mean(x * x) + 1e-6)
        x, conv_state, ssm_state = mix(layer, x, conv_state, ssm_state)
        conv.append(conv_state)
        ssm.append(ssm_state)
    return x @ weights[0]["embed"].T, Mamba2Cache(tuple(conv), tuple(ssm))


def run(weights: Any, token_ids: Sequence[int], cache: Mamba2Cache) -> tuple[jax.Array, Mamba2Cache]:
    for token in token_ids:
        logits, cache = step(weights, jnp.asarray(token), cache)
    return logits, cache


def decode(weights: Any, logits: jax.Array, cache: Mamba2Cache) -> list[jax.Array]:
    """The logits of greedy decoding."""
    found = [logits]
    for _ in range(NEW_TOKENS):
        logits, cache = step(weights, jnp.argmax(found[-1]), cache)
        found.append(logits)
    return found


def differs(first: list[jax.Array], second: list[jax.Array]) -> bool:
    return any(not bool((a == b).all()) for a, b in zip(first, second, strict=True))


def main() -> None:
    weights = make_weights(0)
    split = len(PROMPT) - 20
    spec = kvstore_jax.spec_of_states(empty_cache()._asdict(), model="mamba2-example", weights="seed 0")
    with kvstore.open(spec, dram="64MiB") as store:
        _, prefilled = run(weights, PROMPT[:split], empty_cache())
        kvstore_jax.write_states(store, PROMPT[:split], prefilled._asdict())

        with store.read(store.match(PROMPT)) as lease:
            print(f"resumes at {lease.tokens} of {len(PROMPT)} tokens, {lease.size_bytes} bytes")
            states = kvstore_jax.read_states(lease)
        resumed = Mamba2Cache(tuple(states["conv"]), tuple(states["ssm"]))

        expected = decode(weights, *run(weights, PROMPT[split:], prefilled))
        if differs(expected, decode(weights, *run(weights, PROMPT[split:], resumed))):
            raise SystemExit("the resumed state decodes something else")
        print(f"{NEW_TOKENS} tokens decoded from it: logits bit for bit those of the model that went on")

        for name in ("conv", "ssm"):
            lost = resumed._replace(**{name: getattr(empty_cache(), name)})
            if not differs(expected, decode(weights, *run(weights, PROMPT[split:], lost))):
                raise SystemExit(f"a lost {name} state is not noticed; this comparison proves nothing")
        print("a lost conv or ssm state is noticed")


if __name__ == "__main__":
    main()
