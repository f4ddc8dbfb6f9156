"""An engine's cache groups as values: which layers share a table of pages, and how each tensor lies in a page."""

from __future__ import annotations

from dataclasses import dataclass

from kvstore.errors import SpecError
from kvstore.spec import ReuseRule, TensorSpec

AXES = frozenset({"page", "row", "token", "inner"})


@dataclass(frozen=True)
class EngineTensor:
    """One tensor of the spec, and where in an engine's memory each layer of a group has it.

    The engine has one torch tensor for a layer, or a list of them. From it come, in this order: the `part` of the list;
    the `index` of its first axis; then one of: the elements from `first` on of its last axis, as many as the spec says;
    the `split` part of what each row of a page holds; or what lies from `offset_bytes` on in each page of bytes. What
    the engine calls the shape of its tensor need not be what its kernels take it for: it is they who decide.

    Attributes:
        spec: name, type and shape of the whole tensor, of all tensor-parallel workers together.
        axes: a name for each axis of what comes out of that: `page`, `row` (the spec's first axis: heads, channels),
            `token`, and `inner` for each other one, in the spec's order.
        part: number in the engine's list of tensors for the layer.
        index: of the first axis, where that is no axis of this tensor: 1 for the values in `[2, pages, ...]`.
        first: where it begins in the last axis, where another tensor lies there too: keys, then values.
        split: (number, count): of the elements that lie behind page and row without gaps, that one of so many equal
            parts; what follows `page row` in `axes` is the order in which its elements lie.
        offset_bytes: where it begins in a page of bytes; its axes then follow one another without gaps, in the order
            of `axes`. None for tensors that have their type.

    Raises:
        SpecError: axes that do not fit the spec's tensor.
    """

    spec: TensorSpec
    axes: str
    part: int = 0
    index: int | None = None
    first: int | None = None
    split: tuple[int, int] | None = None
    offset_bytes: int | None = None

    def __post_init__(self) -> None:
        names = self.axes.split()
        what = f"tensor {self.spec.name!r}"
        if set(names) - AXES or names.count("page") != 1 or names.count("row") != 1:
            raise SpecError(f"{what}: axes {self.axes!r} name 'page' and 'row' once each, 'token', and else 'inner'")
        if names.count("token") != int(self.spec.has_tokens):
            raise SpecError(f"{what}: axes {self.axes!r} have {'no' if self.spec.has_tokens else 'an'} axis 'token'")
        if names.count("inner") != len(self.spec.inner):
            raise SpecError(f"{what}: axes {self.axes!r} do not name {len(self.spec.inner)} inner axes")
        if self.first is not None and names[-1] != "inner":
            raise SpecError(f"{what}: axes {self.axes!r} are cut along the last one, which is no 'inner'")
        if sum(each is not None for each in (self.first, self.split, self.offset_bytes)) > 1:
            raise SpecError(f"{what} is cut in more than one way; give one of first, split and offset_bytes")
        if self.split is not None and (
            names[:2] != ["page", "row"] or not self.spec.has_tokens or not 0 <= self.split[0] < self.split[1]
        ):
            raise SpecError(f"{what}: part {self.split} of a row needs tokens, and axes that begin with 'page row'")
        if self.offset_bytes is not None and (names[0] != "page" or self.spec.has_tokens):
            raise SpecError(f"{what}: pages of bytes hold whole states; their axes begin with 'page'")


@dataclass(frozen=True)
class EngineGroup:
    """Layers of an engine with one table of pages, one reuse rule, and tensors of one form.

    Several groups may have one table: layers of different sizes that the engine counts together.

    Attributes:
        index: position of its table in the engine's tuple of tables.
        rule: when its values may be used again.
        layers: model layer numbers, ascending.
        names: the engine's name for each of these layers.
        tensors: of each layer, in the spec's order.
        page_tokens: tokens that one entry of the table stands for; the column of a state after n tokens is
            `(n - 1) // page_tokens`.
        window_tokens: most tokens that a window's state holds (the window less one); None for other groups.
        chunk_tokens: of chunked attention, whose windows begin at multiples of this: what lies before is not needed.

    Raises:
        SpecError: these do not fit each other.
    """

    index: int
    rule: ReuseRule
    layers: tuple[int, ...]
    names: tuple[str, ...]
    tensors: tuple[EngineTensor, ...]
    page_tokens: int
    window_tokens: int | None = None
    chunk_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.index < 0 or self.page_tokens < 1:
            raise SpecError(f"engine group {self.index}: a page of {self.page_tokens} tokens; at least 1 is needed")
        if not self.layers or len(self.names) != len(self.layers) or list(self.layers) != sorted(set(self.layers)):
            raise SpecError(f"engine group {self.index} has layers {self.layers}; name each once, in ascending order")
        if not self.tensors:
            raise SpecError(f"engine group {self.index} has no tensors")
        wants_tokens = self.rule is ReuseRule.ATTENTION or self.window_tokens is not None
        if any(tensor.spec.has_tokens != wants_tokens for tensor in self.tensors):
            word = "need" if wants_tokens else "must not have"
            raise SpecError(f"engine group {self.index}: its tensors {word} a token axis")
        if self.rule is ReuseRule.ATTENTION and self.window_tokens is not None:
            raise SpecError(f"engine group {self.index}: attention over every token has no window")
        if self.chunk_tokens is not None and self.window_tokens != self.chunk_tokens - 1:
            raise SpecError(f"engine group {self.index}: chunks of {self.chunk_tokens} tokens hold one less at most")

    @property
    def is_window(self) -> bool:
        return self.window_tokens is not None

    @property
    def is_state(self) -> bool:
        """Whether a page holds one state, and no tokens."""
        return self.rule is ReuseRule.STATE and self.window_tokens is None

    def first_needed(self, length: int) -> int:
        """The first token that must be there to go on after `length` tokens; `length` itself for states."""
        if self.rule is ReuseRule.ATTENTION:
            return 0
        if self.window_tokens is None:
            return length
        if self.chunk_tokens is not None:
            return length // self.chunk_tokens * self.chunk_tokens
        return max(0, length - self.window_tokens)

    def columns(self, start: int, stop: int) -> range:
        """The table's columns that tokens `[start, stop)` lie in."""
        return range(start // self.page_tokens, -(-stop // self.page_tokens)) if start < stop else range(0)

    def state_column(self, length: int) -> int:
        """The table's column that holds the state after `length` tokens."""
        return (length - 1) // self.page_tokens


def layer_number(name: str) -> int:
    """The model layer that an engine's name for a layer means: 3 for `model.layers.3.self_attn.attn`.

    Raises:
        SpecError: the name has no number, or several.
    """
    numbers = [part for part in name.split(".") if part.isdecimal()]
    if len(numbers) != 1:
        raise SpecError(f"the layer name {name!r} has {len(numbers)} numbers in it; one is needed: the model's layer")
    return int(numbers[0])
