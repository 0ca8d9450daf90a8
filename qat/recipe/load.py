"""Reading a recipe: YAML with line numbers, dotted overrides, all faults at once.

The order is: the file's node tree (every key knows its line), overrides laid over it, the schema, and what the schema
cannot know (does the persona, the suite, the data file exist?). A fault names file, line, key path, value, allowed
values and the nearest name; `load_recipe` raises them together in one `RecipeError`.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

import qat
from qat.errors import UserError
from qat.recipe.checks import CrossFault, KeyPath
from qat.recipe.schema import Recipe
from qat.recipe.tree import Tree, TreeFault, parse_recipe_text

LIBRARY = Path(__file__).resolve().parent / "library"
_PACKAGE = Path(qat.__file__).resolve().parent


class Fault(NamedTuple):
    """One fault of a recipe.

    Attributes:
        file: The recipe's path, or `--set`.
        line: Line in the file, from 1; None where there is none.
        key: Dotted path of the key (`train.sft.epochs`, `arms.2.preset`); empty where the text itself is at fault.
        value: What stands there; None for a missing key.
        problem: What is wrong with it.
        allowed: The allowed values in words, or empty.
        nearest: The allowed name closest to what was written, or empty.
    """

    file: str
    line: int | None
    key: str
    value: object
    problem: str
    allowed: str
    nearest: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        text = f"{place}: {self.key + ': ' if self.key else ''}{self.problem}"
        if self.value is not None:
            text += f" (got {_shown(self.value)})"
        if self.allowed:
            text += f"; allowed: {self.allowed}"
        if self.nearest:
            text += f"; did you mean {self.nearest!r}?"
        return text


class RecipeError(UserError):
    """A recipe with faults; `faults` holds them all."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = list(faults)
        count = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        listing = "\n".join(f"  {fault}" for fault in self.faults)
        super().__init__(f"the recipe has {count}:\n{listing}")

    def __reduce__(self) -> tuple[object, ...]:
        return (RecipeError, (self.faults,))


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in LIBRARY.glob("*.yaml"))


def find_recipe(name_or_path: str | Path) -> Path:
    """The file of a shipped recipe's name or of a path.

    Raises:
        UserError: Neither a shipped name nor a file.
    """
    text = str(name_or_path)
    is_path = isinstance(name_or_path, Path) or "/" in text or text.endswith((".yaml", ".yml"))
    path = Path(text) if is_path else LIBRARY / f"{text}.yaml"
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError("this recipe is a folder", where=text, remedy="name the YAML file")
    if is_path:
        raise UserError("no such recipe file", where=text, remedy=f"shipped recipes: {', '.join(recipe_names())}")
    near = _nearest(text, recipe_names())
    hint = f"did you mean {near!r}? " if near else ""
    raise UserError("unknown recipe", value=text, remedy=f"{hint}shipped recipes: {', '.join(recipe_names())}")


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    Args:
        name_or_path: A shipped name or a YAML file.
        overrides: `dotted.key=value`, the value in YAML; list items by position (`arms.0.name=base`).

    Raises:
        UserError: Unknown or unreadable recipe.
        RecipeError: The recipe has faults; all are listed.
    """
    recipe, faults = _read(name_or_path, overrides)
    if faults or recipe is None:
        raise RecipeError(faults)
    return recipe


def check_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> list[Fault]:
    """All faults of a recipe; empty when it can be run.

    Raises:
        UserError: Unknown or unreadable recipe.
    """
    return _read(name_or_path, overrides)[1]


def _read(name_or_path: str | Path, overrides: Sequence[str]) -> tuple[Recipe | None, list[Fault]]:
    path = find_recipe(name_or_path)
    shown = str(path.relative_to(_PACKAGE.parent)) if path.is_relative_to(_PACKAGE) else str(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"{path}, byte {error.start}"
        raise UserError("the recipe is not UTF-8", where=where, remedy="save it as UTF-8") from error
    except OSError as error:
        raise UserError("the recipe cannot be read", where=str(path), value=str(error)) from error
    tree = parse_recipe_text(text, shown)
    for override in overrides:
        tree.override(override)
    faults = [_from_tree(fault) for fault in tree.faults]
    if tree.data is None:
        return None, faults
    recipe, schema_faults = _validate(tree)
    faults += schema_faults
    if not any(fault.key == "persona" for fault in faults):
        faults += _reference(tree, ("persona",), _PACKAGE / "data" / "personas")
    if not any(fault.key.startswith("behavior.suite") for fault in faults):
        faults += _reference(tree, ("behavior", "suite"), _PACKAGE / "behavior" / "suites")
    faults += _files(tree)
    return recipe, sorted(faults, key=lambda fault: (fault.file == "--set", fault.line or 0))


def _validate(tree: Tree) -> tuple[Recipe | None, list[Fault]]:
    try:
        return Recipe.model_validate(tree.data), []
    except ValidationError as error:
        details = error.errors(include_url=False)
    faults = [fault for detail in details for fault in _from_pydantic(tree, detail, details)]
    # Faults between blocks show only on a whole recipe: without the faulty keys it may be one.
    if all(detail["type"] != "inconsistent" for detail in details):
        try:
            Recipe.model_validate(tree.without([detail["loc"] for detail in details]))
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                if detail["type"] == "inconsistent":
                    faults += _from_pydantic(tree, detail, [])
    return None, faults


def _from_pydantic(tree: Tree, detail: Any, all_details: Sequence[Any]) -> list[Fault]:
    if detail["type"] == "inconsistent":
        return [_from_cross(tree, fault) for fault in detail["ctx"]["faults"]]
    loc: KeyPath = detail["loc"]
    inside = [other["loc"] for other in all_details if len(other["loc"]) > len(loc) and other["loc"][: len(loc)] == loc]
    if detail["type"] == "too_short" and inside:
        return []  # pydantic counts only the valid items; the invalid ones are reported themselves
    problem, allowed, names = _explain(detail, loc)
    # A missing key has no place of its own: its parent's line is shown.
    file, line = tree.place(loc)
    value = None if detail["type"] == "missing" else detail["input"]
    written = str(loc[-1]) if detail["type"] == "extra_forbidden" else value
    nearest = _nearest(written, names) if isinstance(written, str) else ""
    if detail["type"] == "extra_forbidden":
        value = None
    return [Fault(file, line, ".".join(map(str, loc)), value, problem, allowed, nearest)]


def _explain(detail: Any, loc: KeyPath) -> tuple[str, str, list[str]]:
    """Problem, allowed values in words and the names to compare with, of one pydantic error."""
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        names = _keys_of(loc[:-1])
        return "unknown key", ", ".join(names), names
    if kind == "missing":
        return "this key is missing", "", []
    if kind == "literal_error":
        names = [part.strip().strip("'") for part in context["expected"].replace(" or ", ", ").split(",")]
        return "not an allowed value", ", ".join(names).lower() if names == ["False"] else ", ".join(names), names
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    limits = [f"{sign} {context[name]}" for name, sign in signs.items() if name in context]
    if limits:
        return "out of range", " and ".join(limits), []
    if kind == "string_pattern_mismatch":
        return "not a valid name", f"matching {context['pattern']}", []
    wanted = {
        "int_type": "an integer",
        "int_from_float": "an integer",
        "float_type": "a number",
        "finite_number": "a finite number",
        "string_type": "a text (in quotes where YAML would read a number)",
        "bool_type": "true or false",
        "tuple_type": "a list",
        "model_type": "a mapping of keys",
        "too_short": "a list with at least one entry",
        "string_too_short": "a text that is not empty",
    }
    if kind in wanted:
        allowed = wanted[kind]
        if kind == "model_type":
            allowed += f": {', '.join(_keys_of(loc))}"
        return "wrong type" if kind.endswith(("type", "float")) else "too little", allowed, []
    return str(detail["msg"]), "", []


def _keys_of(loc: KeyPath) -> list[str]:
    """Keys of the block at `loc`, found by walking the schema's annotations."""
    model: type[BaseModel] = Recipe
    names_follow = False
    for part in loc:
        if isinstance(part, int) or names_follow:  # the name of an entry of a mapping is no key of a block
            names_follow = False
            continue
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        found = _block_in(annotation)
        if found is None:
            return []
        model, names_follow = found, typing.get_origin(annotation) is dict
    return list(model.model_fields)


def _block_in(annotation: object) -> type[BaseModel] | None:
    """The block that an annotation such as `tuple[Arm, ...]` or `AdapterBlock | None` holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        for argument in typing.get_args(annotation):
            found = _block_in(argument)
            if found is not None:
                return found
    return None


def _from_cross(tree: Tree, fault: CrossFault) -> Fault:
    file, line = tree.place(fault.key)
    nearest = _nearest(fault.value, fault.allowed) if isinstance(fault.value, str) else ""
    return Fault(file, line, fault.key_path, fault.value, fault.problem, ", ".join(fault.allowed), nearest)


def _from_tree(fault: TreeFault) -> Fault:
    return Fault(fault.file, fault.line, fault.key, fault.value, fault.problem, fault.allowed, "")


def _reference(tree: Tree, key: KeyPath, folder: Path) -> list[Fault]:
    """A fault where the persona or suite named at `key` is neither shipped nor a file."""
    value = tree.get(key)
    if not isinstance(value, str) or not value:
        return []
    if value.endswith((".yaml", ".yml")) or "/" in value:
        problem, names = "no such file", []
        if Path(value).is_file():
            return []
    else:
        names = sorted(path.stem for path in folder.glob("*.yaml"))
        problem = "no such name"
        if value in names:
            return []
    file, line = tree.place(key)
    return [Fault(file, line, ".".join(map(str, key)), value, problem, ", ".join(names), _nearest(value, names))]


def _files(tree: Tree) -> list[Fault]:
    """Faults where data, replies or a template that the recipe names is missing (seen from the current folder)."""
    faults = []
    for key, known, folders in (
        ("data.source", "generated", True),
        ("base.chat_template", None, False),
        ("train.distill.replies.file", None, False),
    ):
        value = tree.get(tuple(key.split(".")))
        if not isinstance(value, str) or not value or value == known:
            continue
        if not (Path(value).exists() if folders else Path(value).is_file()):
            file, line = tree.place(tuple(key.split(".")))
            near = _nearest(value, [known]) if known else ""
            problem = "no such file or folder" if folders else "no such file"
            faults.append(Fault(file, line, key, value, problem, known or "", near))
    return faults


def _nearest(written: object, names: Sequence[str]) -> str:
    found = difflib.get_close_matches(str(written), list(names), n=1, cutoff=0.5)
    return found[0] if found else ""


def _shown(value: object) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
