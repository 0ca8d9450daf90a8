"""A small suite and block for the tests of runner and gate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from qat.behavior.suite import Suite, load_suite
from qat.recipe.schema import BehaviorBlock

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "search_memory",
            "description": "Search.",
            "parameters": {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
        },
    }
]


def write_suite(folder: Path, cases: list[dict[str, Any]], **more: Any) -> Path:
    """A suite file with a persona beside it."""
    persona = {"name": "p", "system_prompt": "You are P.", "tools": TOOLS, "facts": {}}
    (folder / "p.yaml").write_text(yaml.safe_dump(persona), encoding="utf-8")
    path = folder / "suite.yaml"
    content = {"name": "small", "version": "1", "persona": "./p.yaml", "cases": cases} | more
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    return path


def case(number: int, **more: Any) -> dict[str, Any]:
    made = {
        "id": f"c-{number:03d}",
        "category": f"k{number % 2}",
        "messages": [{"role": "user", "content": f"question {number}"}],
        "checks": [{"check": "mentions", "any": ["yes"]}, {"check": "no_emoji"}],
    }
    return made | more


def small_suite(folder: Path, count: int = 20, **more: Any) -> Suite:
    return load_suite(write_suite(folder, [case(n, **more) for n in range(count)]))


def block(concurrency: int = 4, sampling: list[dict[str, Any]] | None = None, **gate: Any) -> BehaviorBlock:
    return BehaviorBlock.model_validate(
        {
            "suite": "small",
            "max_tokens": 32,
            "concurrency": concurrency,
            "sampling": sampling or [{"name": "greedy", "temperature": 0.0, "top_p": 1.0, "seeds": [0]}],
            "gate": {"candidate": "new", "reference": "old"} | gate,
        }
    )
