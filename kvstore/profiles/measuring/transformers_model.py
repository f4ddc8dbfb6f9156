"""A `transformers` model as the subject of a measurement. Imported by who has torch and transformers."""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any

from kvstore.errors import ProfileError, UnavailableError
from kvstore.profiles.measuring.presets import preset_fields
from kvstore.profiles.measuring.sizes import kv_size_of
from kvstore.profiles.measuring.subject import Subject
from kvstore.spec import ModelSpec

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import torch

CACHE_ARGUMENTS = ("past_key_values", "cache_params")
"""What forwards call their cache."""
WARM_STEPS = 2
"""Untimed decode steps that begin each session."""


class TransformersModel(Subject):
    """A causal language model on one device.

    Every prompt is prefilled in one forward, with logits of its last token only where the model can do that.

    Args:
        model: in evaluation mode, on its device.
        name: of the profile by default.
        weights: what they are, for people: `random, seed 0`.

    Raises:
        UnsupportedModelError: kvstore knows no spec of the model.
    """

    def __init__(self, model: Any, *, name: str, weights: str) -> None:
        config = model.config.get_text_config()
        parameter = next(model.parameters())
        self._model = model
        self._device: torch.device = parameter.device
        self._vocabulary = int(config.vocab_size)
        parameters = inspect.signature(model.forward).parameters
        self._cache_argument = next((name for name in CACHE_ARGUMENTS if name in parameters), "")
        if not self._cache_argument:
            raise ProfileError(
                f"{name} takes no cache ({' or '.join(CACHE_ARGUMENTS)}): it is no causal language model"
            )
        self._arguments: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in parameters:
            self._arguments["logits_to_keep"] = 1
        spec = ModelSpec.from_transformers(model.config, weights=weights, dtype=parameter.dtype)
        self.name = name
        self.kv = kv_size_of(spec)
        self.tokens_max = int(getattr(config, "max_position_embeddings", None) or 1 << 20)
        self.accelerators = 1
        number_type = str(parameter.dtype).removeprefix("torch.")
        size = sum(each.numel() for each in model.parameters())
        self.origin = f"{spec.model}, {size:,} parameters in {number_type}, weights: {weights}, {self._device_text()}"

    def prefill_s(self, tokens: int) -> float:
        with self._memory(f"a prefill of {tokens} tokens"):
            ids = self._ids(1, tokens)
            self._synchronize()
            begin = perf_counter()
            self._prefill(ids)
            self._synchronize()
            return perf_counter() - begin

    def cache_bytes(self, tokens: int) -> int:
        with self._memory(f"a prefill of {tokens} tokens"):
            return sum(_tensor_bytes(vars(layer)) for layer in self._prefill(self._ids(1, tokens)).layers)

    def decode_steps_s(self, requests: int, context_tokens: int, steps: int) -> tuple[float, ...]:
        with self._memory(f"a batch of {requests} requests with {context_tokens} tokens each"):
            cache = self._prefill(self._ids(requests, context_tokens))
            ids = self._ids(requests, 1)
            found = []
            for step in range(WARM_STEPS + steps):
                self._synchronize()
                begin = perf_counter()
                self._forward(ids, cache)
                self._synchronize()
                if step >= WARM_STEPS:
                    found.append(perf_counter() - begin)
            return tuple(found)

    def _prefill(self, ids: torch.Tensor) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache(config=self._model.config)
        self._forward(ids, cache)
        return cache

    def _forward(self, ids: torch.Tensor, cache: Any) -> None:
        import torch

        with torch.inference_mode():
            self._model(input_ids=ids, **{self._cache_argument: cache}, **self._arguments)

    def _ids(self, requests: int, tokens: int) -> torch.Tensor:
        """Token ids `[requests, tokens]`, the same each time."""
        import torch

        generator = torch.Generator().manual_seed(tokens)
        return torch.randint(self._vocabulary, (requests, tokens), generator=generator).to(self._device)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            import torch

            torch.cuda.synchronize(self._device)

    def _device_text(self) -> str:
        import torch

        if self._device.type == "cuda":
            return f"{torch.cuda.get_device_name(self._device)}, torch {torch.__version__}"
        return f"{self._device}, {torch.get_num_threads()} threads, torch {torch.__version__}"

    @contextmanager
    def _memory(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not _is_lack_of_memory(error):
                raise
            raise ProfileError(
                f"{what} of {self.name} does not fit into the memory of {self._device}; choose shorter lengths, "
                "smaller batches or less context"
            ) from error


def random_model(config: Any, *, name: str, device: str, dtype: str | None, seed: int = 0) -> TransformersModel:
    """A model of a configuration with random weights.

    Raises:
        UnavailableError: torch has no such device. ProfileError: torch has no such number type, or the model does not
            fit. UnsupportedModelError: kvstore knows no spec of it, or transformers no such model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    place, number_type = _device(device), _dtype(dtype, device)
    _check_known(config, number_type)
    with torch.random.fork_rng(devices=[]), _building(name, place):
        torch.manual_seed(seed)
        with place:
            built: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config.get_text_config(), dtype=number_type
            )
    return TransformersModel(built.eval(), name=name, weights=f"random, seed {seed}")


def preset_model(name: str, *, device: str, dtype: str | None, seed: int = 0) -> TransformersModel:
    """A preset (`kvstore.profiles.measuring.presets`), with random weights."""
    from transformers import AutoConfig

    model_type, fields = preset_fields(name)
    config = AutoConfig.for_model(model_type, **fields)
    return random_model(config, name=f"{name}-on-{_device(device).type}", device=device, dtype=dtype, seed=seed)


def trained_model(folder: Path, config: Any, *, device: str, dtype: str | None) -> TransformersModel:
    """The model in a folder with safetensors. Nothing is downloaded, no code of the model runs.

    Raises:
        as `random_model`.
    """
    from transformers import AutoModelForCausalLM

    place, number_type = _device(device), _dtype(dtype, device)
    _check_known(config, number_type)
    with _building(folder.name, place):
        built: Any = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=number_type, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
        built = built.to(place).eval()
    return TransformersModel(built, name=folder.name, weights=f"of the folder {folder.name}")


def _check_known(config: Any, number_type: torch.dtype) -> None:
    """A model that has no profile is refused before minutes go into building it."""
    kv_size_of(ModelSpec.from_transformers(config, weights="any", dtype=number_type))


@contextmanager
def _building(name: str, device: torch.device) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not _is_lack_of_memory(error):
            raise
        raise ProfileError(f"{name} does not fit into the memory of {device}") from error
    except (OSError, ValueError) as error:
        raise ProfileError(f"transformers cannot build {name}: {error}") from error


def _is_lack_of_memory(error: RuntimeError) -> bool:
    """A GPU's allocator has an exception of its own, a CPU's only a text."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def _device(name: str) -> torch.device:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ProfileError(f"torch knows no device {name!r}; write 'cpu', 'cuda' or 'cuda:1'") from error
    if device.type not in ("cpu", "cuda"):
        raise ProfileError(f"device {name!r} is not one that is measured here; write 'cpu', 'cuda' or 'cuda:1'")
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise UnavailableError(
            f"device {name!r} is not there: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices"
        )
    return device


def _dtype(name: str | None, device: str) -> torch.dtype:
    """As asked for; else bfloat16 on a GPU, and float32, which every CPU computes fast, elsewhere."""
    import torch

    if name is None:
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ProfileError(f"torch knows no number type {name!r}; write 'float32', 'bfloat16' or 'float16'")
    return found


def _tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in a layer of a cache, however it keeps them; scalars are its bookkeeping."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size() if value.dim() else 0
    if isinstance(value, dict):
        return sum(map(_tensor_bytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_tensor_bytes, value))
    return 0
