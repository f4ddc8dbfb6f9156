"""Results of a script, one JSON object a line, in the order in which they came."""

import json
from pathlib import Path


class Rows:
    """Writes what `cells.py` reads. A case that raises is reported as broken, and the next goes on.

    Args:
        path: where to.
        model: what is tested.
    """

    def __init__(self, path: Path, model: str) -> None:
        self._path = path
        self._model = model

    def of(self, model: str) -> "Rows":
        """The same file, for another model."""
        return Rows(self._path, model)

    def equal(self, case: str, difference: float, *, control: float | None = None, broken=(), **figures: float) -> None:
        """Bytes of the case that differ from what they should be, and of its control."""
        self._write(case, difference=difference, control=control, broken=list(broken), figures=figures)

    def holds(self, case: str, broken, **figures: float) -> None:
        """What should have held and did not."""
        self._write(case, broken=list(broken), figures=figures)

    def not_run(self, case: str, reason: str) -> None:
        self._write(case, not_run=reason)

    def _write(self, case: str, **row) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({"model": self._model, "case": case, **row}) + "\n")
