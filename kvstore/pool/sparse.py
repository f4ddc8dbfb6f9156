"""Which sparse nodes the pool knows, so that a reader that accepts any coverage finds them."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from kvstore.limits import SPARSE_VARIANTS_MAX
from kvstore.pool.path import SparseNode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from kvstore.pool.path import NodePath
    from kvstore.pool.prompt import Prompt

ENTRY_BYTES = 320
"""Memory of one entry besides its mask: two keys, the objects that hold them, and their places in two tables."""


class SparseNodes:
    """Keys and masks of sparse nodes by the key that each would have if it were held whole.

    A hint, like a ghost: an entry may outlive its node, and is dropped where that is noticed, or when there are too
    many; a node whose entry went is found by those alone who name its coverage. Not thread-safe: the pool calls it
    under its lock.

    Args:
        bytes_max: memory that entries may take.
    """

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._by_whole: OrderedDict[bytes, dict[bytes, bytes]] = OrderedDict()
        self.memory_bytes = 0

    def __len__(self) -> int:
        return sum(map(len, self._by_whole.values()))

    def add(self, path: NodePath, upto_tokens: int) -> None:
        """The sparse nodes of a path up to a length have records."""
        for each in path.sparse:
            if path.end_tokens(each.node) > upto_tokens:
                break
            known = self._by_whole.setdefault(each.whole_key, {})
            self._by_whole.move_to_end(each.whole_key)
            key = path.key(each.node)
            if key not in known:
                known[key] = each.mask
                self.memory_bytes += ENTRY_BYTES + len(each.mask)
        while self.memory_bytes > self._bytes_max:
            _, dropped = self._by_whole.popitem(last=False)
            self.memory_bytes -= sum(ENTRY_BYTES + len(mask) for mask in dropped.values())

    def masks(self, whole_key: bytes) -> Mapping[bytes, bytes]:
        """Masks by key of what is known under a whole key."""
        return self._by_whole.get(whole_key, {})

    def drop(self, whole_key: bytes, key: bytes) -> None:
        """A node is not there any more."""
        known = self._by_whole.get(whole_key, {})
        mask = known.pop(key, None)
        if mask is not None:
            self.memory_bytes -= ENTRY_BYTES + len(mask)
        if not known:
            self._by_whole.pop(whole_key, None)

    def tail_node(self, prompt: Prompt, path: NodePath, blocks: int, end_tokens: int, key: bytes) -> SparseNode | None:
        """The sparse tail of this key that a prompt has after the first blocks of a path; None if there is none."""
        parent = path.keys[blocks - 1] if blocks else path.root
        whole_key = prompt.whole_key(parent, blocks, end_tokens)
        mask = self.masks(whole_key).get(key)
        return None if mask is None else SparseNode(blocks, whole_key, mask)

    def variants(self, prompt: Prompt, is_there: Callable[[bytes], bool]) -> Iterator[NodePath]:
        """Paths of whole blocks on which sparse nodes of a prompt lie, at most `SPARSE_VARIANTS_MAX`.

        The exact path is none of them. Each goes as deep as there are nodes.
        """
        if not self._by_whole:
            return
        exact = prompt.exact.path
        branches: list[NodePath] = []
        self._branch(exact.prefix(0), exact.keys, branches, is_there)
        found = 0
        while branches and found < SPARSE_VARIANTS_MAX:
            path = branches.pop()
            keys: list[bytes] = list(path.keys)
            whole_keys: list[bytes] = []
            while len(keys) < len(exact.keys):
                whole_key = prompt.whole_key(keys[-1], len(keys), (len(keys) + 1) * exact.block_tokens)
                whole_keys.append(whole_key)
                if not is_there(whole_key):
                    break
                keys.append(whole_key)
            self._branch(path, tuple(whole_keys), branches, is_there)
            yield path.continued(tuple(keys))
            found += 1

    def _branch(
        self, path: NodePath, whole_keys: tuple[bytes, ...], branches: list[NodePath], is_there: Callable[[bytes], bool]
    ) -> None:
        """Where a path goes on with these keys as long as its blocks are whole: the paths that leave it sparsely."""
        if len(branches) >= SPARSE_VARIANTS_MAX:
            return
        for number, whole_key in enumerate(whole_keys):
            for key, mask in tuple(self.masks(whole_key).items()):
                if not is_there(key):
                    self.drop(whole_key, key)
                    continue
                node = len(path.keys) + number
                before = (*path.keys, *whole_keys[:number])
                branches.append(path.continued((*before, key), SparseNode(node, whole_key, mask)))
                if len(branches) >= SPARSE_VARIANTS_MAX:
                    return
