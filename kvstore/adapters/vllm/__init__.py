"""kvstore as a KV connector of vLLM: prefix reuse beyond the GPU, and the hand-over between instances (docs/vllm.md).

vLLM loads it by module path: `kv_connector="KVStoreConnector"`,
`kv_connector_module_path="kvstore.adapters.vllm.connector"`. Only that module and those of the worker's half need vLLM
or torch; this one imports neither.
"""

from __future__ import annotations
