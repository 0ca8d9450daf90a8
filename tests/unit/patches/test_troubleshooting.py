"""docs/troubleshooting.md is what the defects say of themselves."""

from __future__ import annotations

import html
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from qat.patches.protocol import Defect
from qat.patches.registry import all_defects

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("qat_script_make_docs", ROOT / "scripts" / "make_docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def shown(script: Any) -> str:
    """What a reader sees, as a Markdown parser of its own renders it: no markup, entities resolved."""
    return html.unescape(re.sub(r"<[^>]+>", "", MarkdownIt().render(script.render_troubleshooting())))


def test_the_committed_page_is_fresh(script: Any) -> None:
    committed = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    assert committed == script.render_troubleshooting(), "run python scripts/make_docs.py"


@pytest.mark.parametrize("defect", all_defects(), ids=lambda defect: defect.name)
def test_every_defect_stands_there_once_word_for_word(defect: Defect, shown: str) -> None:
    assert shown.count(f"({defect.name})\n") == 1
    for text in (defect.title, defect.breaks, defect.affects, defect.repair):
        assert text.replace("`", "") in shown


def test_reports_are_links(script: Any) -> None:
    page = script.render_troubleshooting()
    for owner, name, number in re.findall(r"([\w.-]+)/([\w.-]+)#(\d+)", " ".join(d.upstream for d in all_defects())):
        assert f"[{name}#{number}](https://github.com/{owner}/{name}/issues/{number})" in page


def test_no_mark_and_no_empty_section_is_left(script: Any) -> None:
    page = script.render_troubleshooting()
    assert "<!--" not in page
    assert not re.search(r"^## .*\n\s*(## |\Z)", page, re.M)
    assert "\n\n\n" not in page


def test_a_template_without_a_place_is_an_error(script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    template = tmp_path / "template"
    template.write_text("# T\n\n<!-- defects: vllm_* -->\n")
    monkeypatch.setattr(script, "TEMPLATE", template)
    with pytest.raises(ValueError, match="peft_mamba_out_proj"):
        script.render_troubleshooting()
