"""The case study's profiles and traffic, written down for tests of the planner alone."""

from __future__ import annotations

from dataclasses import replace

from kvstore.profile import KvSize, MeasuredCurve, PolynomialCurve, Profile
from kvstore.schedule.planning.lengths import TruncatedLogNormal
from kvstore.schedule.planning.plan import Traffic

GBIT = 1e9 / 8
KV = KvSize(state_bytes=173.92 * 2**20, token_bytes=17_280)
H200 = Profile(
    "h200", "test", MeasuredCurve((1024, 8192, 32768, 131072), (0.44, 0.72, 1.84, 7.40)), KV,
    PolynomialCurve((0.025,)), 20, 8, 131072,
)  # fmt: skip
H20 = replace(H200, name="h20", prefill=PolynomialCurve((0.469, 0.13, 2.94e-4), 1000.0))
LENGTHS = TruncatedLogNormal(9.90, 1.00, 128, 131072)
TRAFFIC = Traffic(LENGTHS, 1024)
