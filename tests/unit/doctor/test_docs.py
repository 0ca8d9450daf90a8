"""docs/doctor.md names every finding that the sources can give, and none besides."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.unit.doctor.test_planted import DEEP, NAMES, READING, SHARDED

ROOT = Path(__file__).resolve().parents[3]
CODE = re.compile(r"[a-z]+(?:_[a-z0-9]+)+")
ROW = re.compile(r"^\| `(\w+)` \| ([EWN](?:, [EWN])*) \|", re.M)
#: Makers of findings: the class itself and the helpers that fill in what their findings share.
MAKERS = {"Finding", "Meaning", "_error", "_wrong", "_refused", "_unchecked", "_unusable"}
#: Tables from a code to the names that have the fault, or to what follows.
TABLES = {"wrong", "faulty", "_FACTS"}


def literals(node: ast.AST) -> set[str]:
    return {
        part.value
        for part in ast.walk(node)
        if isinstance(part, ast.Constant) and isinstance(part.value, str) and CODE.fullmatch(part.value)
    }


def codes_of(tree: ast.AST) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args and isinstance(node.func, ast.Name) and node.func.id in MAKERS:
            found |= literals(node.args[0])
        elif isinstance(node, ast.Tuple) and len(node.elts) > 1 and ast.unparse(node.elts[1]).startswith("Severity."):
            found |= literals(node.elts[0])
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = {target.id for target in targets if isinstance(target, ast.Name)}
            if "code" in names:
                found |= literals(node.value)
            elif names & TABLES and isinstance(node.value, ast.Dict):
                found |= {code for key in node.value.keys if key is not None for code in literals(key)}
    return found


def test_every_finding_is_in_the_page() -> None:
    sources = sorted((ROOT / "export" / "doctor").glob("*.py"))
    given = {code for path in sources for code in codes_of(ast.parse(path.read_text(encoding="utf-8")))}
    page = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    rows = [code for code, _ in ROW.findall(page)]
    assert len(rows) == len(set(rows))
    assert set(rows) == given


def test_planted_faults_are_many_and_in_the_page() -> None:
    page = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    planted = {code for cases in (READING, SHARDED, NAMES, DEEP) for *_, expected in cases for code in expected}
    assert len(planted) >= 30 and planted <= {code for code, _ in ROW.findall(page)}
