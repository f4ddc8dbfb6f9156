"""What models cost, and whether their caches fit through a link: `python examples/17_profiles.py`.

Uses the profiles that ship with the package, then writes one by hand. Neither torch nor a GPU is needed; `kvstore
profile` measures a model of your own.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from kvstore.errors import ProfileError
from kvstore.profile import KvSize, MeasuredCurve, PolynomialCurve, Profile
from kvstore.profiles import load_profile, published_kv_throughput, write_profile

TOKENS = 32_768
LINK_GBPS = 10

print(f"a prompt of {TOKENS} tokens on 8 H200, and its cache on a link of {LINK_GBPS} Gbit/s:")
for row in published_kv_throughput():
    profile = load_profile(row.profile)
    size_bytes = profile.kv.total_bytes(TOKENS)
    print(
        f"  {row.model + (' (dense)' if row.is_dense else ''):22s} prefill {profile.prefill(TOKENS):5.2f} s, "
        f"cache {size_bytes / 1e6:6.0f} MB, transfer {size_bytes * 8 / (LINK_GBPS * 1e9):5.2f} s"
    )

hybrid = load_profile("paper-1t-h200")
everything, missing = hybrid.kv.total_bytes(TOKENS), hybrid.kv.missing_bytes(TOKENS, TOKENS // 2)
print(f"{hybrid.name}: to somebody who has half of the blocks, {missing / everything:.0%} of the bytes must cross")
for what, how in hybrid.inferred:
    print(f"  not printed, but inferred: {what}: {how}")

try:
    MeasuredCurve(xs=(1024.0, 8192.0), ys=(0.9, 0.7))
except ProfileError as error:
    print(f"refused: {error}")

mine = Profile(
    name="my-model",
    source="an example; nothing was measured",
    prefill=MeasuredCurve(xs=(1024.0, 8192.0, 32768.0), ys=(0.1, 0.6, 3.1)),
    kv=KvSize(state_bytes=50e6, token_bytes=10_000),
    decode_step=PolynomialCurve(coefficients=(0.015, 0.0002)),
    decode_batch_max=64,
    accelerators=1,
    tokens_max=32_768,
    inferred=(("decode_step", "guessed"),),
)
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "my-model.json"
    write_profile(mine, path)
    assert load_profile(path) == mine
    print(f"read back: {load_profile(path).name}, {path.stat().st_size} bytes of JSON")
