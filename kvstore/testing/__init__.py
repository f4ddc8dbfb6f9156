"""Conformance kits and helpers for whoever implements one of `kvstore.abc`'s interfaces, or tests with kvstore.

The kits need pytest, some of them Hypothesis (`pip install kvstore[test]`), so nothing is imported here:
import the module of the interface in question, such as `kvstore.testing.transport`.
"""
