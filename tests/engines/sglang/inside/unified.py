"""SGLang's unified radix cache and hybrid controller, by its own kit, on CPU tensors: `unified.py PLAN RESULTS`.

The plan has `runs` (each a key of `server.MODELS`, a layout and an interface), `folder` and `seed`.
"""

import json
import os
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

import server
from faults import flip_in_files, flush, forget, lie, mend, swap_pages
from rows import Rows
from server import MODELS, PAGE_TOKENS, WINDOW_TOKENS, Server, Snapshot, differing

PAGES = 6
TOKENS = PAGES * PAGE_TOKENS


class Cases:
    """All cases of one model, layout and interface."""

    def __init__(self, model: str, layout: str, interface: str, folder: Path, seed: int, rows: Rows) -> None:
        self.model, self.layout, self.interface, self.folder, self.seed, self.rows = (
            model, layout, interface, folder, seed, rows,
        )  # fmt: skip
        self._stores = 0
        folder.mkdir(parents=True)
        self.sockets = Path(tempfile.mkdtemp(prefix="kvstore-"))  # a socket's path is short
        # What a prefix needs besides the anchor's pages.
        self.pools = [name for name, has in (("swa", MODELS[model].has_swa), ("mamba", MODELS[model].has_mamba)) if has]

    def run(self) -> None:
        cases = {
            "warm": self.warm, "restarted, warm disk": self.restarted, "two tenants": self.tenants,
            "corrupted record on disk": self.corrupted,
        }  # fmt: skip
        if self.pools:
            cases |= {"state without its anchor": self.without_anchor, "anchor without its state": self.without_state}
        try:
            self._run(cases)
        finally:
            shutil.rmtree(self.sockets)

    def _run(self, cases: dict) -> None:
        for name, case in cases.items():
            try:
                case(name)
            except (Exception, SystemExit) as error:
                traceback.print_exc()
                self.rows.holds(name, [f"{type(error).__name__}: {error}"])

    # What the cases are made of

    def config(self, **settings) -> dict:
        extra = {
            "backend_name": "kvstore", "module_path": "kvstore.adapters.sglang", "class_name": "KVStoreHiCache",
            "model": "tiny/unified", "weights": f"test {self.seed}", "start_deadline_s": 30.0, **settings,
        }  # fmt: skip
        if self.interface == "zero-copy":
            extra["interface_v1"] = 1
        if "socket" not in extra:
            self._stores += 1
            extra |= {"own_socket": str(self.sockets / f"{self._stores}.sock"), "dram": "64MiB"}
        return extra

    def attached(self, config: dict) -> dict:
        return self.config(socket=config["own_socket"])

    def server(self, config: dict) -> Server:
        return Server(self.model, self.layout, config)

    def prompt(self, case: int) -> list[int]:
        return list(range(100 * (case + 1), 100 * (case + 1) + TOKENS))

    def control(self, config: dict, tokens: list[int], expected: Snapshot) -> int:
        """The least that a fault in any pool changes: the anchor's pages swapped, a state or window not read."""
        least = []
        for fault in ("kv", *self.pools):
            with self.server(config) as faulty:
                if fault == "kv":
                    swap_pages(faulty.backend, PAGE_TOKENS)
                else:
                    lie(faulty.backend, fault)
                length, found = faulty.restore(tokens)
                least.append(differing(expected, found) if length == TOKENS else 0)
        return min(least)

    # Cases

    def warm(self, name: str) -> None:
        """One server saves, a cold one at the same store restores."""
        config, tokens = self.config(), self.prompt(0)
        with self.server(config) as first:
            expected = first.insert(tokens, self.seed)
            first.save(tokens)
            with self.server(self.attached(config)) as cold:
                length, found = cold.restore(tokens)
            control = self.control(self.attached(config), tokens, expected)
        broken = [] if length == TOKENS else [f"{length} of {TOKENS} tokens came"]
        self.rows.equal(name, differing(expected, found), control=control, broken=broken)

    def restarted(self, name: str) -> None:
        config, tokens = self.config(ssd=[f"{self.folder / 'restarted'}:64MiB"]), self.prompt(1)
        with self.server(config) as first:
            expected = first.insert(tokens, self.seed + 1)
            first.save(tokens)
            flush(first.backend)
        with self.server(config) as again:
            length, found = again.restore(tokens)
        control = self.control(config, tokens, expected)
        broken = [] if length == TOKENS else [f"{length} of {TOKENS} tokens came"]
        self.rows.equal(name, differing(expected, found), control=control, broken=broken)

    def tenants(self, name: str) -> None:
        """One prompt of requests with another `extra_key` or `cache_salt`."""
        config, tokens = self.config(), self.prompt(2)
        namespaces = ({}, {"extra_key": "one"}, {"cache_salt": "one"})
        broken, expected, found = [], [], []
        with self.server(config) as first:
            for number, namespace in enumerate(namespaces):
                with self.server(self.attached(config)) as other:
                    length, _ = other.restore(tokens, **namespace)
                    broken += [f"{namespace or 'nobody'} found {length} tokens of another"] if length else []
                expected.append(first.insert(tokens, self.seed + 10 + number, **namespace))
                first.save(tokens, **namespace)
            for namespace in namespaces:
                with self.server(self.attached(config)) as other:
                    length, snapshot = other.restore(tokens, **namespace)
                    broken += [] if length == TOKENS else [f"{namespace or 'nobody'} found {length} of its own tokens"]
                    found.append(snapshot)
        difference = sum(differing(mine, theirs) for mine, theirs in zip(expected, found, strict=True))
        self.rows.equal(name, difference, control=differing(expected[0], found[1]), broken=broken)

    def corrupted(self, name: str) -> None:
        """What a prompt's end needs is damaged on the disk: its state, its window, or its last page."""
        folder = self.folder / "corrupted"
        config, tokens = self.config(ssd=[f"{folder}:64MiB"]), self.prompt(3)
        with self.server(config) as first:
            expected = first.insert(tokens, self.seed + 3)
            first.save(tokens)
            flush(first.backend)
        flipped = 0
        for pool in self.pools or ["kv"]:
            # A state's beginning, or the first token of the last page, in the first tensor.
            data = expected[pool][0]
            tokens_in = {"kv": TOKENS, "swa": WINDOW_TOKENS, "mamba": PAGE_TOKENS}[pool]
            first = len(data) - len(data) * PAGE_TOKENS // tokens_in
            flipped += flip_in_files(folder, data[first : first + 16])
        with self.server(config) as again:
            length, found = again.restore(tokens)
        broken = [] if flipped else ["the bytes were not found, so that nothing was damaged"]
        broken += [f"all {length} tokens came"] if length == TOKENS else []
        if self.pools:
            broken += [f"{length} tokens came without their state"] if length else []
        kept = {"kv": [each[: len(each) * length // TOKENS] for each in expected["kv"]]} if length else {}
        self.rows.equal(name, differing(kept, found), broken=broken, tokens=length)

    def without_anchor(self, name: str) -> None:
        """States are written before the pages that they belong to: nothing is there until these are, too."""
        self._in_part(name, "kv", 4)

    def without_state(self, name: str) -> None:
        """Pages without the state at their end are no prefix that anything could go on from."""
        self._in_part(name, self.pools[-1], 5)

    def _in_part(self, name: str, lost: str, case: int) -> None:
        config, tokens = self.config(), self.prompt(case)
        with self.server(config) as first:
            expected = first.insert(tokens, self.seed + case)
            forget(first.backend, lost)
            first.save(tokens)
            with self.server(self.attached(config)) as cold:
                length, _ = cold.restore(tokens)
            broken = [f"{length} tokens came without their {lost} pool"] if length else []
            mend(first.backend)
            first.save(tokens)
            with self.server(self.attached(config)) as cold:
                length, found = cold.restore(tokens)
            broken += [] if length == TOKENS else [f"{length} tokens came after all was written"]
            control = self.control(self.attached(config), tokens, expected)
        self.rows.equal(name, differing(expected, found), control=control, broken=broken)


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    server.prepare()
    for model, layout, interface in plan["runs"]:
        name = f"{model}, {layout}, {interface}"
        folder = Path(plan["folder"]) / name.replace(", ", "-").replace(" ", "")
        Cases(model, layout, interface, folder, plan["seed"], Rows(Path(sys.argv[2]), name)).run()
    sys.stdout.flush()
    os._exit(0)  # threads of SGLang's that wait for more work do not hold the process up


if __name__ == "__main__":
    main()
