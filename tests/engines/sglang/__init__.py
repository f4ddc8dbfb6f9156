"""Tests with SGLang: plans and judgement here, `inside` what its environment runs, `shims` on the path there.

`shims` stands in for what SGLang takes from a GPU's software on a machine without one.
"""
