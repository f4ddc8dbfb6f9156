"""SGLang's factory of dynamic backends and its HiCacheController, on CPU tensors: `controller.py PLAN RESULTS`.

The plan has `layouts`, `interfaces` (`generic`, `zero-copy`), `folder` and `seed`.
"""

import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

import rig as rigs
from faults import flip_in_files, flip_in_memory, flush, lie, mend, swap_pages
from rig import PAGE_TOKENS, Rig, differing
from rows import Rows
from sglang.srt.mem_cache.radix_cache import RadixKey
from spare import Spare

PAGES = 24
DAMAGED = 7
AGAIN_S = 60.0


class Cases:
    """All cases of one layout and one interface; each has its own folder, tokens and store."""

    def __init__(self, layout: str, interface: str, folder: Path, seed: int, rows: Rows, spares: list[Spare]) -> None:
        self.layout, self.interface, self.folder, self.seed, self.rows, self.spares = (
            layout, interface, folder, seed, rows, spares,
        )  # fmt: skip
        self._stores = 0
        folder.mkdir(parents=True)
        self.sockets = Path(tempfile.mkdtemp(prefix="kvstore-"))  # a socket's path is short

    def run(self) -> None:
        cases = {
            "cold": self.cold, "warm": self.warm, "restarted, warm disk": self.restarted,
            "corrupted record on disk": self.corrupted_on_disk, "corrupted record in memory": self.corrupted_in_memory,
            "evicted between exists and get": self.evicted, "two tenants": self.tenants,
            "tensor-parallel ranks": self.ranks, "node killed": self.killed,
        }  # fmt: skip
        if not self.spares:  # the store's owner is no part of a layout: the first one stands for all
            del cases["node killed"]
        try:
            self._run(cases)
        finally:
            shutil.rmtree(self.sockets)

    def _run(self, cases: dict) -> None:
        for name, case in cases.items():
            try:
                case(name)
            except Exception as error:
                traceback.print_exc()
                self.rows.holds(name, [f"{type(error).__name__}: {error}"])

    # What the cases are made of

    def config(self, **settings) -> dict:
        """Settings of a backend with a store of its own, at a socket that no other case has."""
        extra = {
            "backend_name": "kvstore", "module_path": "kvstore.adapters.sglang", "class_name": "KVStoreHiCache",
            "weights": f"test {self.seed}", "attach_again_s": 0.1, "start_deadline_s": 30.0, **settings,
        }  # fmt: skip
        if self.interface == "zero-copy":
            extra["interface_v1"] = 1
        if not {"socket", "own_socket"} & set(extra):
            self._stores += 1
            extra |= {"own_socket": str(self.sockets / f"{self._stores}.sock")}
        if "socket" not in extra:
            extra["dram"] = "64MiB"
        return extra

    def attached(self, config: dict, **settings) -> dict:
        return self.config(socket=config["own_socket"], **settings)

    def key(self, case: int, pages: int = PAGES, **namespace) -> RadixKey:
        first = 1000 * (case + 1)
        return RadixKey(list(range(first, first + pages * PAGE_TOKENS)), **namespace)

    # Cases

    def cold(self, name: str) -> None:
        """Pages found in a store that has none; the control asks one that has them."""
        config = self.config()
        with Rig(self.layout, config) as one:
            found = one.read(self.key(0)).hit_pages
            one.save(one.fill(self.key(0), self.seed))
            with Rig(self.layout, self.attached(config)) as other:
                control = other.read(self.key(0)).hit_pages
        self.rows.equal(name, found, control=control)

    def warm(self, name: str) -> None:
        """One controller saves, a cold one at the same store reads, into other slots."""
        config = self.config()
        key = self.key(0)
        with Rig(self.layout, config) as first, Rig(self.layout, self.attached(config)) as second:
            pages = first.fill(key, self.seed)
            saved = first.save(pages)
            second.host.alloc(5 * PAGE_TOKENS)  # other slots than in the first
            longer = RadixKey([*key.raw_token_ids(), *([5] * PAGE_TOKENS)])
            warm = second.read(longer)
            broken = [f"{saved} of {PAGES} pages were saved"] if saved != PAGES else []
            broken += [f"{warm.pages} of {PAGES} pages came"] if warm.pages != PAGES else []
            difference = differing(pages.bytes_of, warm.bytes_of)
            expected = first.device_bytes(pages.device)
            difference += differing([expected], [second.device_bytes(second.to_device(warm))])
            with Rig(self.layout, self.attached(config)) as third:
                swap_pages(third.backend, PAGE_TOKENS)
                control = differing(pages.bytes_of, third.read(key).bytes_of)
            self.rows.equal(name, difference, control=control, broken=broken)

    def restarted(self, name: str) -> None:
        config = self.config(ssd=[f"{self.folder / 'restarted'}:64MiB"])
        key = self.key(1)
        with Rig(self.layout, config) as first:
            pages = first.fill(key, self.seed + 1)
            first.save(pages)
            flush(first.backend)
        with Rig(self.layout, config) as again:
            came = again.read(key)
            broken = [f"{came.pages} of {PAGES} pages came"] if came.pages != PAGES else []
        with Rig(self.layout, config) as again:
            swap_pages(again.backend, PAGE_TOKENS)
            control = differing(pages.bytes_of, again.read(key).bytes_of)
        self.rows.equal(name, differing(pages.bytes_of, came.bytes_of), control=control, broken=broken)

    def corrupted_on_disk(self, name: str) -> None:
        """A page's bytes change on the disk: the pages before it come, it and those after it do not."""
        folder = self.folder / "corrupted"
        config = self.config(ssd=[f"{folder}:64MiB"])
        key = self.key(2)
        with Rig(self.layout, config) as first:
            pages = first.fill(key, self.seed + 2)
            first.save(pages)
            flush(first.backend)
        flipped = flip_in_files(folder, pages.bytes_of[DAMAGED][:16])
        with Rig(self.layout, config) as again:
            came = again.read(key)
        self._check_damaged(name, pages, came, flipped)

    def corrupted_in_memory(self, name: str) -> None:
        """The same in the store's memory; the control reads it unverified and has to get other bytes."""
        config = self.config()
        key = self.key(3)
        with Rig(self.layout, config) as first:
            pages = first.fill(key, self.seed + 3)
            first.save(pages)
            flipped = flip_in_memory(pages.bytes_of[DAMAGED][:16])
            with Rig(self.layout, self.attached(config, verify=False)) as trusting:
                control = differing(pages.bytes_of, trusting.read(key).bytes_of)
            with Rig(self.layout, self.attached(config)) as second:
                came = second.read(key)
        self._check_damaged(name, pages, came, flipped, control)

    def _check_damaged(self, case, pages, came, flipped, control=None) -> None:
        broken = [] if flipped else ["the page's bytes were not found, so that nothing was damaged"]
        if came.pages != DAMAGED:
            broken.append(f"page {DAMAGED} is damaged and {came.pages} pages came")
        difference = differing(pages.bytes_of[: came.pages], came.bytes_of[: came.pages])
        self.rows.equal(case, difference, control=control, broken=broken, pages=came.pages)

    def evicted(self, name: str) -> None:
        """The store loses the pages after it has said that they are there."""
        config = self.config()
        key = self.key(4)
        with Rig(self.layout, config) as first, Rig(self.layout, self.attached(config)) as second:
            pages = first.fill(key, self.seed + 4)
            first.save(pages)
            operation = second.find(key)
            broken = [] if operation.storage_hit_count else ["it was not there"]
            broken += [] if first.backend.clear() else ["it could not be evicted"]
            came = second.fetch(operation)
            broken += [f"{came.pages} pages came of a store that is empty"] if came.pages else []
            lie(second.backend)
            lied = second.fetch(operation)
            control = differing(pages.bytes_of[: lied.pages], lied.bytes_of[: lied.pages])
            broken += [] if first.save(pages) == PAGES else ["it cannot be saved again"]
            with Rig(self.layout, self.attached(config)) as third:
                again = third.read(key)
            broken += [] if again.pages == PAGES else [f"{again.pages} pages came after it was saved again"]
            difference = differing(pages.bytes_of[: came.pages], came.bytes_of[: came.pages])
            difference += differing(pages.bytes_of, again.bytes_of)
        self.rows.equal(name, difference, control=control, broken=broken)

    def tenants(self, name: str) -> None:
        """One prompt under four names of whose it is: requests' `extra_key` and `cache_salt`, a server's `tenant`."""
        config = self.config()
        broken = []
        with Rig(self.layout, config) as first, Rig(self.layout, self.attached(config, tenant="other")) as other:
            namespaces = ({}, {"extra_key": "one"}, {"cache_salt": "one"}, {"extra_key": "on", "cache_salt": "e"})
            expected = []
            for number, namespace in enumerate(namespaces):
                key = self.key(5, 4, **namespace)
                found = first.read(key).hit_pages
                broken += [f"{namespace or 'nobody'} found {found} pages of another"] if found else []
                expected.append(first.fill(key, self.seed + 10 + number))
                first.save(expected[-1])
            difference = 0
            for pages in expected:
                difference += differing(pages.bytes_of, first.read(pages.key).bytes_of)
                found = other.read(pages.key).hit_pages
                broken += [f"tenant other found {found} pages"] if found else []
            control = differing(expected[0].bytes_of, first.read(expected[1].key).bytes_of)
        self.rows.equal(name, difference, control=control, broken=broken)

    def ranks(self, name: str) -> None:
        """Two tensor-parallel ranks have the same page keys and other bytes."""
        config = self.config()
        key = self.key(6)
        with Rig(self.layout, config, tp=(0, 2)) as zero, Rig(self.layout, config, tp=(1, 2)) as one:
            mine = zero.fill(key, self.seed + 20)
            zero.save(mine)
            found = one.read(key).hit_pages
            broken = [f"rank 1 found {found} pages of rank 0"] if found else []
            theirs = one.fill(key, self.seed + 21)
            one.save(theirs)
            cold = self.attached(config)
            with Rig(self.layout, cold, tp=(0, 2)) as left, Rig(self.layout, cold, tp=(1, 2)) as right:
                came = left.read(key), right.read(key)
            with Rig(self.layout, cold, tp=(0, 1)) as alone:
                found = alone.read(key).hit_pages
                broken += [f"a server without ranks found {found} pages of rank 0"] if found else []
            difference = differing(mine.bytes_of, came[0].bytes_of) + differing(theirs.bytes_of, came[1].bytes_of)
            control = differing(mine.bytes_of, came[1].bytes_of)
        self.rows.equal(name, difference, control=control, broken=broken)

    def killed(self, name: str) -> None:
        """The process that owns the store dies between exists and get, and in the middle of saving; another comes."""
        owner = self.config()
        node, again = self.spares.pop(), self.spares.pop()
        try:
            node.serve({"layout": self.layout, "extra": owner})
            key, other = self.key(7), self.key(8)
            with Rig(self.layout, self.attached(owner)) as one:
                pages, more = one.fill(key, self.seed + 30), one.fill(other, self.seed + 31)
                broken = [] if one.save(pages) == PAGES else ["it was not saved"]
                operation, trusting = one.find(key), one.find(key)
                node.kill()
                came = one.fetch(operation)
                # A page that came before the node went is right; what matters is what SGLang takes for there.
                difference = differing(pages.bytes_of[: came.pages], came.bytes_of[: came.pages])
                lie(one.backend)
                lied = one.fetch(trusting)
                control = differing(pages.bytes_of[: lied.pages], lied.bytes_of[: lied.pages])
                mend(one.backend)
                saved = one.save(more)
                broken += [f"{saved} pages were saved in a store whose owner is dead"] if saved else []
                broken += ["a dead store has pages"] if one.read(key).hit_pages else []
                again.serve({"layout": self.layout, "extra": owner})
                until = time.monotonic() + AGAIN_S
                while one.save(more) != PAGES and time.monotonic() < until:
                    time.sleep(0.1)
                back = one.read(other)
                broken += [] if back.pages == PAGES else [f"{back.pages} pages came from the node that took over"]
                difference += differing(more.bytes_of, back.bytes_of)
            self.rows.equal(name, difference, control=control, broken=broken, pages=came.pages)
        finally:
            node.kill()
            again.kill()


def serve(settings: dict) -> Rig:
    """What a spare process does: a rig whose backend owns the store."""
    rigs.prepare()
    return Rig(settings["layout"], settings["extra"])


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    spares = [Spare(serve), Spare(serve)]
    try:
        rigs.prepare()
        for layout in plan["layouts"]:
            for interface in plan["interfaces"]:
                rows = Rows(Path(sys.argv[2]), f"{layout}, {interface}")
                folder = Path(plan["folder"]) / f"{layout}-{interface}"
                Cases(layout, interface, folder, plan["seed"], rows, spares).run()
    finally:
        for spare in spares:
            spare.kill()
    sys.stdout.flush()
    os._exit(0)  # threads of SGLang's that wait for more work do not hold the process up


if __name__ == "__main__":
    main()
