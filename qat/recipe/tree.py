"""YAML text as data in which every key remembers file and line, and dotted overrides laid over it."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import yaml

from qat.recipe.checks import KeyPath

OVERRIDE_FILE = "--set"


class TreeFault(NamedTuple):
    """A fault of the text itself or of an override; `allowed` says in words what would be right."""

    file: str
    line: int | None
    key: str
    value: object
    problem: str
    allowed: str = ""


_CORE = (
    ("null", r"^(?:null|Null|NULL|~|)$", ["n", "N", "~", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?[0-9]+$", list("-+0123456789")),
    (
        "float",
        r"^[-+]?(?:(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$",
        list("-+.0123456789"),
    ),
)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(str(loader.construct_scalar(node)))  # PyYAML reads 010 as octal; YAML 1.2 does not


def with_core_scalars(base: Any) -> Any:
    """A loader class that reads YAML 1.2's core scalars.

    `1e-3` is a number, `no` and `on` are words, `7:30` and dates stay text.

    Args:
        base: A safe loader of PyYAML, in Python or in C.
    """
    made: Any = type("CoreLoader", (base,), {"yaml_implicit_resolvers": {}})
    for kind, pattern, first in _CORE:
        made.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(pattern), first)
    made.add_constructor("tag:yaml.org,2002:int", _construct_int)
    return made


_Loader = with_core_scalars(yaml.SafeLoader)


def parse_value(text: str) -> object:
    """One YAML value, by the rules of recipes.

    Raises:
        yaml.YAMLError: Not YAML.
    """
    return yaml.load(text, Loader=_Loader)


class Tree:
    """A recipe's data with the place of every key.

    Attributes:
        data: The mapping, or None where the text gave none.
        faults: Faults found so far.
    """

    def __init__(self, file: str) -> None:
        self.file = file
        self.data: dict[str, Any] | None = None
        self.faults: list[TreeFault] = []
        self._endless = False
        self._places: dict[KeyPath, tuple[str, int | None]] = {}

    def place(self, key: Sequence[str | int]) -> tuple[str, int | None]:
        """File and line of the key, or of its nearest parent that is written down."""
        path = tuple(key)
        while path and path not in self._places:
            path = path[:-1]
        return self._places.get(path, (self.file, 1))

    def get(self, key: Sequence[str | int]) -> object:
        """The value at the key, None where there is none."""
        value: Any = self.data
        for part in key:
            if isinstance(value, dict):
                value = value.get(part)
            elif isinstance(value, list) and isinstance(part, int) and part < len(value):
                value = value[part]
            else:
                return None
        return value

    def without(self, keys: Iterable[Sequence[str | int]]) -> object:
        """A copy of the data that lacks these keys; list items are taken out from the back."""
        data = copy.deepcopy(self.data)
        for key in sorted(map(tuple, keys), key=lambda path: [(isinstance(p, int), p) for p in path], reverse=True):
            holder: Any = data
            for part in key[:-1]:
                inside = (isinstance(holder, dict) and part in holder) or (
                    isinstance(holder, list) and isinstance(part, int) and part < len(holder)
                )
                holder = holder[part] if inside else None
            if key and isinstance(holder, dict):
                holder.pop(key[-1], None)
            elif key and isinstance(holder, list) and isinstance(key[-1], int) and key[-1] < len(holder):
                del holder[key[-1]]
        return data

    def override(self, text: str) -> None:
        """Lay `dotted.key=value` over the data; what is wrong with it becomes a fault."""
        key, equals, written = text.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            self._refuse("", text, "not an override", "dotted.key=value, as in train.sft.epochs=2")
            return
        try:
            value = parse_value(written)
        except yaml.YAMLError as error:
            self._refuse(key, written, f"the value is not YAML: {_reason(error)}")
            return
        if self.data is not None:
            self._put(self.data, parts, value)

    def _put(self, data: dict[str, Any], parts: list[str], value: object) -> None:
        dotted = ".".join(parts)
        holder: Any = data
        path: list[str | int] = []
        for depth, part in enumerate(parts):
            last = depth == len(parts) - 1
            step: str | int = part
            if isinstance(holder, list):
                if not part.isdecimal() or int(part) >= len(holder):
                    self._refuse(dotted, part, f"{'.'.join(map(str, path))} is a list", f"0 to {len(holder) - 1}")
                    return
                step = int(part)
            elif not isinstance(holder, dict):
                self._refuse(dotted, holder, f"{'.'.join(map(str, path))} is a single value, no block")
                return
            path.append(step)
            if last:
                holder[step] = value
            elif isinstance(holder, dict) and holder.get(part) is None:
                holder[part] = {}
                self._places[tuple(path)] = (OVERRIDE_FILE, None)
            holder = holder[step]
        for known in [known for known in self._places if known[: len(path)] == tuple(path)]:
            del self._places[known]
        self._places[tuple(path)] = (OVERRIDE_FILE, None)

    def _refuse(self, key: str, value: object, problem: str, allowed: str = "") -> None:
        self.faults.append(TreeFault(OVERRIDE_FILE, None, key, value, problem, allowed))

    def _fault(self, line: int, key: KeyPath, problem: str) -> None:
        self.faults.append(TreeFault(self.file, line, ".".join(map(str, key)), None, problem))

    def read(self, node: yaml.Node, loader: yaml.SafeLoader) -> None:
        """Take over a node tree: data, places, and faults for repeated keys."""
        self._walk(node, (), set())
        if self._endless:
            return
        data = loader.construct_document(node)
        if isinstance(data, dict):
            self.data = data

    def _walk(self, node: yaml.Node, path: KeyPath, open_nodes: set[int]) -> None:
        line = node.start_mark.line + 1
        if id(node) in open_nodes:
            self._fault(line, path, "an alias that contains itself")
            self._endless = True
            return
        self._places.setdefault(path, (self.file, line))
        inner = open_nodes | {id(node)}
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key_node, value_node in node.value:
                key = str(key_node.value)
                below = (*path, key)
                if key in seen:
                    self._fault(key_node.start_mark.line + 1, below, "this key stands twice")
                seen.add(key)
                self._places[below] = (self.file, key_node.start_mark.line + 1)
                self._walk(value_node, below, inner)
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self._walk(item, (*path, index), inner)


def parse_recipe_text(text: str, file: str) -> Tree:
    """Parse a recipe's text.

    Args:
        text: YAML.
        file: Name shown in faults.

    Returns:
        The tree; its `data` is None where the text is no mapping, and `faults` then says why.
    """
    tree = Tree(file)
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if isinstance(node, yaml.MappingNode):
            tree.read(node, loader)
        else:
            line = 1 if node is None else node.start_mark.line + 1
            found = "nothing" if node is None else "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
            tree.faults.append(TreeFault(file, line, "", None, f"a recipe is a mapping of keys, this is {found}"))
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark is not None else None
        tree.data = None
        tree.faults.append(TreeFault(file, line, "", None, f"not valid YAML: {_reason(error)}"))
    finally:
        loader.dispose()
    return tree


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return str(getattr(error, "problem", None) or str(error).splitlines()[0])
