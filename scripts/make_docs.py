"""Write docs/recipe.md from the recipe's schema, docs/troubleshooting.md from the known defects, docs/checks.md.

Run `python scripts/make_docs.py` after a change of `qat/recipe/schema.py`, of a shipped recipe, of what a behaviour
check or a module of `patches/` says about itself, or of `scripts/troubleshooting.template`; tests hold that the
committed files are what this program writes.
"""

from __future__ import annotations

import json
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from qat.behavior.reference import page as checks_page
from qat.patches.protocol import Defect
from qat.patches.registry import all_defects
from qat.recipe.schema import Recipe

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "recipe.md"
LIBRARY = ROOT / "qat" / "recipe" / "library"
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"
CHECKS = ROOT / "docs" / "checks.md"
TEMPLATE = ROOT / "scripts" / "troubleshooting.template"

HEAD = """# Recipe reference

*Written by `scripts/make_docs.py` from `qat/recipe/schema.py`; do not edit by hand.*

A recipe is one YAML file. `qat recipes list` names the shipped ones, `qat recipes show NAME` prints one with its
comments, `qat validate FILE` reports every fault at once (file, line, key, value, what is allowed, nearest name).
Unknown keys are refused and values are strict (`"3"` is not an integer). Any key can be set on the command line by its
dotted path: `qat run --recipe annie_tiny --set train.sft.epochs=2`.
"""


def render() -> str:
    """The whole text of docs/recipe.md."""
    schema = Recipe.model_json_schema()
    return "\n".join([HEAD, _library(), *_sections("", schema, schema["$defs"], {})])


def _library() -> str:
    rows = ["## Shipped recipes", "", "| recipe | what it is | arms |", "|---|---|---|"]
    for path in sorted(LIBRARY.glob("*.yaml")):
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        arms = ", ".join(f"`{arm['name']}`" for arm in recipe["arms"])
        text = " ".join(recipe.get("description", "").split())
        rows.append(f"| [`{path.stem}`](../qat/recipe/library/{path.name}) | {_cell(text)} | {arms} |")
    return "\n".join(rows) + "\n"


def _sections(path: str, block: dict[str, Any], blocks: dict[str, Any], shown: dict[str, str]) -> list[str]:
    """A block as a table, followed by the blocks that its keys hold.

    Args:
        path: Key path of the block, empty for the whole recipe.
        block: Its JSON schema.
        blocks: JSON schema of every block by name.
        shown: Key path under which each block is described; filled here, so that a second use links to the first.
    """
    required = set(block.get("required", ()))
    head = f"## `{path}`" if path else "## The recipe"
    rows = [head, "", " ".join(block.get("description", "").split()), ""]
    rows += ["| key | type | default | meaning |", "|---|---|---|---|"]
    children: list[tuple[str, str]] = []
    for key, field in block["properties"].items():
        full = f"{path}.{key}" if path else key
        kind, meaning = _type(field), field.get("description", "")
        for name in _references(field):
            if name not in shown:
                shown[name] = full
                children.append((full, name))
            kind = f"[{kind}](#{_anchor(shown[name])})"
            meaning = meaning or blocks[name].get("description", "").split("\n")[0]
        if "default" in field:
            default = f"`{json.dumps(field['default'], ensure_ascii=False)}`"
        else:
            default = "required" if key in required else "the block's own"
        rows.append(f"| `{key}` | {kind} | {_cell(default)} | {_cell(meaning)} |")
    sections = ["\n".join(rows) + "\n"]
    for full, name in children:
        sections += _sections(full, blocks[name], blocks, shown)
    return sections


def _references(field: dict[str, Any]) -> list[str]:
    """Names of the blocks that a field holds, directly, as an alternative, in a list or under names."""
    if "$ref" in field:
        return [field["$ref"].rsplit("/", 1)[1]]
    inner = [*field.get("anyOf", ()), *field.get("allOf", ()), *([field["items"]] if "items" in field else [])]
    inner += field.get("patternProperties", {}).values()
    return [name for part in inner for name in _references(part)]


def _type(field: dict[str, Any]) -> str:
    """A field's type and range in words."""
    if "$ref" in field:
        return "block"
    if "anyOf" in field:
        if "enum" in field:
            return _choices([value for value in field["enum"] if value is not None]) + " or null"
        return " or ".join(_type(part) for part in field["anyOf"])
    if "const" in field or "enum" in field:
        return _choices(field.get("enum", [field.get("const")]))
    if "patternProperties" in field:
        return f"{_type(next(iter(field['patternProperties'].values())))}s by name"
    kind: str = field.get("type", "any")
    if kind == "array":
        return f"list of {_type(field['items'])}"
    if "pattern" in field:
        return f"text matching `{field['pattern']}`"
    signs = (("exclusiveMinimum", "> "), ("minimum", "≥ "), ("exclusiveMaximum", "< "), ("maximum", "≤ "))
    bounds = ", ".join(f"{sign}{field[name]}" for name, sign in signs if name in field)
    words = {"string": "text", "number": "number", "integer": "integer", "boolean": "true or false", "null": "null"}
    return words[kind] + (f" {bounds}" if bounds else "")


def _choices(values: list[object]) -> str:
    return ", ".join(f"`{value if isinstance(value, str) else json.dumps(value)}`" for value in values)


def _anchor(path: str) -> str:
    """GitHub's anchor of a heading that is one code span."""
    return re.sub(r"[^a-z0-9_-]", "", path.lower())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def render_troubleshooting() -> str:
    """The whole text of docs/troubleshooting.md: the template, with the defects where it asks for them.

    Each mark `<!-- defects: PATTERN … -->` takes those of its patterns that no mark before it took; a section in which
    nothing but a mark stood and that took none is left out.
    """
    waiting = {defect.name: defect for defect in all_defects()}

    def take(mark: re.Match[str]) -> str:
        patterns = mark[1].split()
        names = [name for name in waiting if any(fnmatchcase(name, pattern) for pattern in patterns)]
        return "\n\n".join(_entry(waiting.pop(name)) for name in names)

    text = re.sub(r"<!-- defects: (.*?) -->", take, TEMPLATE.read_text(encoding="utf-8"))
    if waiting:
        raise ValueError(f"the template has no place for {', '.join(waiting)}")
    return re.sub(r"## [^\n]*\n\s*(?=## )", "", text)


def _entry(defect: Defect) -> str:
    """One defect as an item of a list: what it is, what it breaks, where it stands, what to do."""
    upstream = re.sub(
        r"([\w.-]+)/([\w.-]+)#(\d+)", r"[\2#\3](https://github.com/\1/\2/issues/\3)", _prose(defect.upstream)
    )
    lines = (
        f"- **{_prose(defect.title)}** (`{defect.name}`)",
        _prose(defect.breaks),
        f"In {upstream}; {_prose(defect.affects)}.",
        _prose(defect.repair),
    )
    return "\\\n  ".join(lines)


def _prose(text: str) -> str:
    """Text for Markdown: what would be read as markup is escaped outside of code spans (`_` inside a word is not)."""
    parts = text.split("`")
    markup = re.compile(r"[\\*<]|&(?=#?\w+;)|(?<![^\W_])_|_(?![^\W_])")
    parts[::2] = [markup.sub(r"\\\g<0>", part) for part in parts[::2]]
    return "`".join(parts)


def main() -> None:
    """Write the files."""
    pages = ((TARGET, render()), (TROUBLESHOOTING, render_troubleshooting()), (CHECKS, checks_page()))
    for target, text in pages:
        target.write_text(text, encoding="utf-8")
        print(f"wrote {target.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
