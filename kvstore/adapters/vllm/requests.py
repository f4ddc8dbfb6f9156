"""One of vLLM's requests as the store knows it: token ids, salt, adapter, images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvstore.adapters.paged import NotCached, RequestIdentity, adapter_digest, adapter_name, adapter_stamp, identify

if TYPE_CHECKING:
    import numpy.typing as npt


class Identities:
    """Reads who a request is. Adapters' files are read once each."""

    def __init__(self) -> None:
        self._adapters: dict[tuple[int, str, str], tuple[str, object]] = {}

    def of(self, request: Any) -> RequestIdentity | NotCached:
        """What a request is cached under, or why it is not cached.

        Args:
            request: vLLM's `Request`.
        """
        if getattr(request, "resumable", False):
            return NotCached("a streaming session: its prompt changes while it runs")
        has_embeddings = request.prompt_embeds is not None or request.prompt_token_ids is None
        adapter = ""
        if request.lora_request is not None:
            if getattr(request.lora_request, "load_inplace", False):
                return NotCached("an adapter that is replaced in place: one name stands for several")
            try:
                adapter, stamp = self._adapter(request.lora_request)
                if stamp != adapter_stamp(request.lora_request.lora_path):
                    # The engine may have read the old ones, or the new ones.
                    return NotCached("an adapter whose files were replaced while it was served")
            except OSError as error:
                return NotCached(f"an adapter whose files cannot be read: {error}")
        return identify(
            cache_salt=request.cache_salt,
            adapter=adapter,
            inputs=[
                (each.mm_position.offset, each.mm_position.length, each.modality, each.identifier)
                for each in request.mm_features
            ],
            has_embeddings=has_embeddings,
            tokens=request.num_prompt_tokens,
        )

    def _adapter(self, lora: Any) -> tuple[str, object]:
        """Its name in the store, and the stamp of its files from before they were read."""
        known = (lora.lora_int_id, lora.lora_name, lora.lora_path)
        if known not in self._adapters:
            stamp = adapter_stamp(lora.lora_path)
            variant = "3d" if getattr(lora, "is_3d_lora_weight", False) else ""
            name = adapter_name(lora.lora_name, lora.lora_path, adapter_digest(lora.lora_path), variant)
            self._adapters[known] = name, stamp
        return self._adapters[known]


def known_tokens(request: Any, stop: int) -> npt.NDArray[np.uint32]:
    """The ids of a request's first `stop` tokens, decoded ones included."""
    return np.fromiter(request.all_token_ids[:stop], np.uint32, stop)
