"""Settings for all tests."""

import os
import signal

# A shell that starts the tests in the background has them ignore Ctrl-C, and whatever they start as well.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Before anything imports torch: several threads per test process on few cores run many times slower, and child
# processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
from hypothesis import HealthCheck, settings

# Machines are shared: an example that is slow once is no failure. The same examples every time, so that a red run
# can be looked at; KVSTORE_HYPOTHESIS=explore looks further.
settings.register_profile("repeatable", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("explore", deadline=None, max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("KVSTORE_HYPOTHESIS", "repeatable"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs on a GPU where there is one carries the marker `gpu`: `make test-gpu` runs these."""
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec") and "cuda" in item.callspec.id.split("-"):
            item.add_marker(pytest.mark.gpu)
