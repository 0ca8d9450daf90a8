from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from qat.data.audit.findings import AuditReport, Finding
from qat.report.audit import audit_page, write_audit_page

ROWS = {"rows": 2, "tokens": 500, "supervised": 60, "cut_rows": 1, "cut_turns": 3, "lost_turns": 7, "share": 0.12}


def report() -> AuditReport:
    examples = (("line 5 (c4)", "<script>alert(1)</script>"),)
    numbers = {
        "conversations": 2,
        "persona": "annie",
        "max_length": 300,
        "tokens": {"total": 500, "share": 0.12, "cut_turns": 3, "lost_turns": 7, "by_category": {"<b>talk</b>": ROWS}},
        "lengths": {"truncated": 1, "histogram": [{"from": 200, "to": 260, "count": 2}]},
        "categories": {"<b>talk</b>": 2},
        "replies": {"suites": ["mine"], "checks": ["no_emoji"], "total": 4, "failing": 1, "languages": {"en": 4}},
    }
    return AuditReport([Finding("no_emoji", "fault", 1, "1 of 4 replies fail", examples)], numbers)


class Words(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_says_what_was_found_and_runs_nothing(tmp_path: Path) -> None:
    write_audit_page(tmp_path / "a.html", "set.jsonl", report().to_json())
    page = Words((tmp_path / "a.html").read_text("utf-8"))
    assert "script" not in page.tags and "link" not in page.tags and "svg" in page.tags
    for said in ("Audit of set.jsonl", "1 of 4 fail (mine: 1 checks)", "3 assistant turns cut, 7 lost", "12.0 %"):
        assert said in page.text
    assert "<script>alert(1)</script>" in page.text and "<b>talk</b>" in page.text


def test_an_audit_of_one_part_shows_that_part() -> None:
    page = Words(audit_page("x", AuditReport([], {"conversations": 0, "persona": "annie"}).to_json()))
    assert "neither faults nor warnings" in page.text and "supervised" not in page.text
