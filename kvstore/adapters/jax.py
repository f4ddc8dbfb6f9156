"""JAX arrays in and out of a store: by DLPack where memory can be shared, and whole states of a model at once.

    from kvstore.adapters import jax as kvstore_jax

    spec = kvstore_jax.spec_of_states({"conv": cache.conv, "ssm": cache.ssm}, model="mamba2", weights="run-7")
    with kvstore.open(spec) as store:
        kvstore_jax.write_states(store, token_ids, {"conv": cache.conv, "ssm": cache.ssm})
        with store.read(store.match(more_token_ids)) as lease:
            states = kvstore_jax.read_states(lease)  # {"conv": [...], "ssm": [...]}, bit for bit

States are passed as JAX models keep them: for each name one array per layer, `[1, rows, ...]`, of a batch of one. For
anything else, such as attention, `as_source` makes of a JAX array what a `Writer` takes, and `as_jax` gives a tensor of
a `LayerView`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvstore.errors import LeaseError, SpecError, UnavailableError, WriteError
from kvstore.spec import CacheGroup, DType, ModelSpec, ReuseRule, Segment, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvstore.spec import ChunkGrid
    from kvstore.store import LayerView, Lease, Store

STATES = "state"
"""Name of the group that `spec_of_states` makes."""


def as_source(array: Any) -> Any:
    """A JAX array as something that `Writer.put` and `put_state` take, sharing its memory.

    Waits until the array is computed. On the host it is seen as a NumPy array (also bfloat16 and float8, for which
    NumPy has no DLPack); on a GPU as a torch tensor, by DLPack.

    Args:
        array: a committed or uncommitted `jax.Array` on one device.

    Raises:
        WriteError: no JAX array, one that is traced, or spread over several devices. UnavailableError: it lies on a GPU
        and torch is not installed, or on another accelerator.
    """
    jax = _jax()
    if isinstance(array, jax.core.Tracer) or not isinstance(array, jax.Array):
        kind = type(array).__name__
        raise WriteError(f"{kind} is no JAX array with values; call this outside of jit, on what it returned")
    devices = array.devices()
    if len(devices) != 1:
        raise WriteError(
            f"the array is spread over {len(devices)} devices; pass each worker's share, "
            "array.addressable_shards[number].data, with shard= for the writer"
        )
    (device,) = devices
    if device.platform == "cpu":
        return np.asarray(array)
    if device.platform != "gpu":
        raise UnavailableError(
            f"arrays on {device.platform} have no DLPack that is known here; pass jax.device_get(array)"
        )
    return _torch().from_dlpack(array)


def as_jax(layer: LayerView, name: str, *, device: Any = None) -> Any:
    """One tensor of a leased layer as a JAX array of its own, in the spec's type.

    Args:
        layer: of a lease.
        name: of the tensor.
        device: a `jax.Device`; None is JAX's default.

    Returns:
        `[rows, tokens, *inner]`, or `[rows, *inner]` of a state.

    Raises:
        LeaseError: the lease was released, or has ended. SpecError: no such tensor. UnavailableError: a GPU without
        torch to copy there; pass a device of the host and use `jax.device_put`.
    """
    jax = _jax()
    device = jax.devices()[0] if device is None else device
    if device.platform == "gpu":
        return _through_torch(layer, name, f"cuda:{device.local_hardware_id}")
    found = layer.read(name)
    dtype = layer.dtype(name)
    # A copy of the caller's own: JAX may take over its memory.
    return jax.device_put(found if dtype.is_native else found.view(jax.numpy.dtype(dtype.label)), device)


def _through_torch(layer: LayerView, name: str, place: str) -> Any:
    """As `as_jax`, by way of a torch tensor whose memory JAX takes over."""
    torch = _torch()
    tensor = torch.empty(layer.shape(name), dtype=getattr(torch, layer.dtype(name).label), device=place)
    layer.copy_to(**{name: tensor})
    return _jax().dlpack.from_dlpack(tensor)


def spec_of_states(
    states: Mapping[str, Sequence[Any]],
    *,
    model: str,
    weights: str,
    block_tokens: int = 64,
    numerics: Mapping[str, str] | None = None,
) -> ModelSpec:
    """The spec of a model whose whole cache are states: Mamba-2, a gated delta net and the like.

    Args:
        states: by name, for each layer the array as the model keeps it, `[1, rows, ...]`; their values do not count.
        model: name of the architecture.
        weights: identity of the weights; see `ModelSpec`.
        block_tokens: tokens per step of the prefix keys.
        numerics: further facts that change the states' bytes.

    Raises:
        SpecError: arrays of one name differ between layers, names have unequal numbers of layers, or there are none.
    """
    layers = _layer_count(states)
    tensors = []
    for name, arrays in states.items():
        shapes = {(tuple(array.shape), str(array.dtype)) for array in arrays}
        if len(shapes) != 1:
            raise SpecError(f"the arrays of state {name!r} differ between layers: {sorted(shapes)}; name them apart")
        (shape, dtype) = shapes.pop()
        if len(shape) < 2 or shape[0] != 1:
            raise SpecError(f"state {name!r} has shape {list(shape)}; expected is [1, rows, ...], of a batch of one")
        # One unit: how a model's states split over workers is not to be seen from their shapes.
        rows = Segment("rows", 1, shape[1])
        tensors.append(TensorSpec(name, DType.parse(dtype), (rows,), shape[2:], has_tokens=False))
    group = CacheGroup(STATES, ReuseRule.STATE, tuple(range(layers)), tuple(tensors))
    return ModelSpec(model, weights, block_tokens, (group,), tuple(sorted((numerics or {}).items())))


def write_states(
    store: Store,
    token_ids: Any,
    states: Mapping[str, Sequence[Any]],
    *,
    salt: bytes = b"",
    adapter: str = "",
    grid: ChunkGrid | None = None,
) -> int:
    """Store a model's states after exactly these tokens, under the spec of `spec_of_states`; the length.

    Args:
        token_ids: all that the model has seen.
        states: as for `spec_of_states`.
        salt, adapter, grid: as for `Store.write`.

    Raises:
        WriteError: other states than the spec's, or of another shape or type. Otherwise as `Store.write` and
        `as_source`.
    """
    layers = _layer_count(states)
    if layers != len(store.spec.layers):
        raise WriteError(f"these are states of {layers} layers, the store's model has {len(store.spec.layers)}")
    expected = {tensor.name for group in store.spec.groups for tensor in group.tensors}
    if set(states) != expected:
        raise WriteError(f"these are states {sorted(states)}, the store's model has {sorted(expected)}")
    with store.write(token_ids, salt=salt, adapter=adapter, grid=grid) as writer:
        (at,) = writer.resume_at
        for number, layer in enumerate(store.spec.layers):
            arrays = {name: as_source(each[number]) for name, each in states.items()}
            unbatched = {name: _without_batch(name, array) for name, array in arrays.items()}
            writer.put_state(layer, at=at, **unbatched)
        writer.commit()
    return at


def read_states(lease: Lease, *, device: Any = None) -> dict[str, list[Any]]:
    """The states of a lease as `write_states` took them: by name, for each layer `[1, rows, ...]`.

    Args:
        device: a `jax.Device`; None is JAX's default.

    Raises:
        LeaseError: the spec has other groups than states, or as `as_jax`.
    """
    if len(lease.spec.groups) != 1 or lease.spec.groups[0].name != STATES:
        raise LeaseError("this lease has more than the states of spec_of_states; read its layers with as_jax")
    names = [tensor.name for tensor in lease.spec.groups[0].tensors]
    layers = list(lease)
    return {name: [as_jax(layer, name, device=device)[None] for layer in layers] for name in names}


def _layer_count(states: Mapping[str, Sequence[Any]]) -> int:
    counts = {len(arrays) for arrays in states.values()}
    if len(counts) != 1 or counts == {0}:
        found = {name: len(arrays) for name, arrays in states.items()}
        raise SpecError(f"states are given for each layer, by name, equally many of each; these are {found}")
    return counts.pop()


def _without_batch(name: str, array: Any) -> Any:
    if not array.shape or array.shape[0] != 1:
        raise WriteError(f"state {name!r} has shape {list(array.shape)}; expected is [1, rows, ...], of a batch of one")
    return array[0]


def _jax() -> Any:
    try:
        import jax
    except ImportError as error:
        raise UnavailableError(f"JAX cannot be imported ({error}); pip install 'kvstore[jax]'") from error
    return jax


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise UnavailableError(
            f"arrays on GPUs go through torch, which cannot be imported ({error}); pip install 'kvstore[torch]', or "
            "pass arrays of the host"
        ) from error
    return torch
