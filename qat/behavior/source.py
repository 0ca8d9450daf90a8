"""The text of a suite: its data, the line of every key, and the faults found in it, which are told all at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import yaml

from qat.errors import UserError
from qat.recipe.tree import Tree, with_core_scalars

Key = tuple[str | int, ...]
# libyaml, where PyYAML was built with it, reads a suite of a thousand cases ten times as fast.
_Loader = with_core_scalars(getattr(yaml, "CSafeLoader", yaml.SafeLoader))
SHOWN = 20
"""More faults than these are only counted."""


class _Fault(NamedTuple):
    """Line, key of the case or of the file, and what is wrong below it; cases made of one share it."""

    line: int
    place: str
    problem: str


class Source:
    """A suite's file.

    Args:
        path: The YAML file.

    Raises:
        UserError: It cannot be read or is no YAML mapping.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tree = Tree(str(path))
        self._faults: dict[_Fault, list[str]] = {}
        try:
            loader = _Loader(path.read_text(encoding="utf-8-sig"))
            try:
                node = loader.get_single_node()
                if isinstance(node, yaml.MappingNode):
                    self._tree.read(node, loader)
            finally:
                loader.dispose()
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise UserError("The suite cannot be read.", where=str(path), value=str(error)) from error
        for fault in self._tree.faults:
            self._faults[_Fault(fault.line or 1, fault.key, f": {fault.problem}")] = []
        if self._tree.data is None:
            self.raise_faults()
            raise UserError("The suite file is not right.", where=str(path), value="a suite is a mapping of keys")

    @property
    def data(self) -> dict[str, Any]:
        """What the file says."""
        return self._tree.data or {}

    def line(self, key: Key) -> int:
        """Line of a key, or of its nearest parent that is written down; from 1."""
        return self._tree.place(key)[1] or 1

    def fault(self, key: Key, problem: str, label: str = "") -> None:
        """Note what is wrong at a key; `label` names the case, of the many that one written case may become."""
        head = f"{key[0]}[{key[1]}]" if len(key) > 1 and isinstance(key[1], int) else ".".join(map(str, key[:2]))
        below = "".join(f".{part}" for part in key[2:])
        self._faults.setdefault(_Fault(self.line(key), head or "file", f"{below}: {problem}"), []).append(label)

    def raise_faults(self) -> None:
        """Tell all faults, in the order of the file.

        Raises:
            UserError: There are some.
        """
        if not self._faults:
            return
        found = sorted(self._faults.items(), key=lambda fault: fault[0].line)
        faults = [f"line {line}: {place}{_cases(labels)}{problem}" for (line, place, problem), labels in found]
        shown = faults[:SHOWN] + ([f"… and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else [])
        raise UserError(
            f"The suite has {len(faults)} fault{'s' * (len(faults) > 1)}.",
            where=str(self.path),
            value="\n          ".join(shown),
        )


def _cases(labels: list[str]) -> str:
    """Which cases have the fault: one by name, and how many more."""
    named = list(dict.fromkeys(label for label in labels if label))
    more = f" and {len(named) - 1} more" if len(named) > 1 else ""
    return f" ({named[0]}{more})" if named else ""
