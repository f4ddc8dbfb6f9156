"""One request of a workload."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Request:
    """What comes, and when.

    Attributes:
        number: from 0, in the order of the workload.
        arrival_s: since the simulation's start; with `after`, seconds of thinking after that request has ended.
        prompt_tokens: all of them.
        output_tokens: that will be produced, the first one included.
        keys: prefix keys of the prompt's whole blocks, 32 bytes each, joined. Equal keys mean equal prefixes.
        end_keys: keys of the whole blocks of prompt and output together, where the workload knows them; else empty.
        after: the number of an earlier request before whose end this one does not come (turns of a session, calls of
            an agent); None for one that comes by itself. It stands behind the one that begins its session and before
            the next that comes by itself: the workload is not read further ahead, and who is read late comes late.
        salt: isolates tenants.
    """

    number: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    keys: bytes
    end_keys: bytes = b""
    after: int | None = None
    salt: bytes = b""
