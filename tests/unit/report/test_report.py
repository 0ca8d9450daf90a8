from __future__ import annotations

import itertools
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from qat.errors import UserError
from qat.report import write_report
from qat.report.charts import nice_ticks
from qat.report.page import duration, size

VOID = {"meta", "br", "line", "circle", "rect", "polyline", "link", "img", "hr"}


class Page(HTMLParser):
    """An independent reading of the file: elements, attributes, visible text, and whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.words.append(data)
            if {"td", "th"} & set(self.open):
                self.rows[-1][-1] += f" {data.strip()}"

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def row(self, *beginning: str) -> str:
        """The first table row whose first cell starts with one of the words."""
        return next(
            " ".join(" ".join(row).split()) for row in self.rows if row and row[0].split()[:1] == list(beginning)
        )


def read(folder: Path) -> Page:
    path = write_report(folder)
    assert path == folder / "report.html"
    return Page(path.read_text("utf-8"))


def test_shows_the_numbers_of_the_run(run_folder: Path) -> None:
    page = read(run_folder)
    assert "INCONCLUSIVE" in page.text and "more cases or seeds are needed" in page.text
    # 114 of 120: Wilson at 95 % is 89.5 to 97.7 (statsmodels' proportion_confint gives 0.89520 and 0.97689).
    shown = "nvfp4_all_qad candidate distilled all 95.0 % 89.5 to 97.7"
    shown += " 120 −2.5 −6.5 to +0.5 0.0079 suite 0.0091 98.1 % 3.1 % other experts 2.6 MB 1 min 01 s"
    assert page.row("nvfp4_all_qad") == shown
    assert page.row("base") == "base base 17.5 % 11.7 to 25.3 120 −80.0 −84.0 to −77.0 – – – 1 min 01 s"
    assert "114 of 120" in page.text
    assert "8 min 42 s in all" in page.text  # 6.2 + 94 + 11 + 131 + 14 + 3 * 7 + 4 * 61 + 0.4 = 521.6 s
    assert page.row("distill/all") == "distill/all done 2 min 11 s 1,031 MB"
    assert "16.0 % of 61234" in page.text
    assert not any(row and row[0].strip() == "report" for row in page.rows)


def test_errors_and_flips_of_an_arm_against_itself(run_folder: Path) -> None:
    verdict = json.loads((run_folder / "verdict.json").read_text())
    for arm, errors in (("bf16", 0), ("nvfp4_all_ptq", 1), ("nvfp4_all_qad", 4)):
        verdict["arms"][arm]["errors"] = errors
    twice = {"flips": 3, "pairs": 120, "rate": 0.025, "low": 0.0085, "high": 0.0709, "reason": None}
    few = {"flips": 1, "pairs": 4, "rate": None, "low": None, "high": None, "reason": "4 cases are too few"}
    verdict["comparisons"][1] |= {"self_flips": twice, "reference_self_flips": few}
    verdict["comparisons"][2] |= {"self_flips": None, "reference_self_flips": few}
    (run_folder / "verdict.json").write_text(json.dumps(verdict))
    page = read(run_folder)
    assert "120 0 errors" in page.row("bf16") and "120 1 error " in page.row("nvfp4_all_ptq")
    assert "120 4 errors" in page.row("nvfp4_all_qad") and "error" not in page.row("base")
    rows = [" ".join(" ".join(row).split()) for row in page.rows]
    flips = {row.split()[0]: row for row in rows if " bf16 120 " in row}
    assert " 12 0 3 of 120 2.5 %, 0.9 to 7.1 1 of 4 4 cases are too few " in flips["nvfp4_all_ptq"]
    assert " 3 0 – 1 of 4 4 cases are too few " in flips["nvfp4_all_qad"] and " 0 – – " in flips["base"]


def test_needs_nothing_from_outside(run_folder: Path) -> None:
    text = write_report(run_folder).read_text("utf-8")
    page = Page(text)
    assert not re.search(r"https?://|//cdn|@import|url\(", text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "embed"}
    assert not [
        key for _, attributes in page.tags for key in attributes if key in ("src", "href") or key.startswith("on")
    ]


def test_escapes_every_text(hostile_run: Path) -> None:
    page = read(hostile_run)
    assert not {tag for tag, _ in page.tags} & {"script", "img"}
    assert (
        page.text.count("<script>alert(1)</script>") >= 10
    )  # description, reason, warning, categories, replies, details
    assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on")]


def test_flips_stand_side_by_side_worst_first(run_folder: Path) -> None:
    page = read(run_folder)
    order = re.findall(r"topic_switch-\d{4}", page.text)
    assert order == ["topic_switch-0000", "topic_switch-0002", "topic_switch-0001"]  # two failed checks before one
    assert "no_emoji found 😀" in page.text and "I set it for seven." in page.text
    assert '→ set_reminder({"text": "call Amma"})' in page.text


def test_at_most_ten_flips(run_folder: Path) -> None:
    verdict = json.loads((run_folder / "verdict.json").read_text())
    verdict["gate"]["candidate"] = "nvfp4_all_ptq"
    (run_folder / "verdict.json").write_text(json.dumps(verdict))
    rows = [json.loads(line) for line in (run_folder / "behavior/nvfp4_all_ptq.jsonl").read_text().splitlines()]
    for row in rows:
        row["passed"], row["failed_checks"] = False, [{"check": "no_emoji", "detail": "x"}]
    (run_folder / "behavior/nvfp4_all_ptq.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = read(run_folder)
    assert len([1 for tag, attributes in page.tags if tag == "article"]) == 10


PARTS = {
    "verdict.json": "verdict.json is not there",
    "divergence.json": "divergence.json is not there",
    "data/audit.json": "data/audit.json is not there",
    "sft/log.jsonl": "sft/log.jsonl is not there",
    "distill": "distill/*/log.jsonl is not there",
    "receipt.json": "receipt.json is not there",
    "recipe.yaml": "recipe.yaml is not there",
    "behavior/nvfp4_all_qad.jsonl": "behavior/nvfp4_all_qad.jsonl is not there",
}


@pytest.mark.parametrize(("part", "expected"), PARTS.items())
def test_a_missing_part_is_named_and_the_rest_is_shown(run_folder: Path, part: str, expected: str) -> None:
    complete = read(run_folder)
    assert "Not in this report" not in complete.text
    path = run_folder / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = read(run_folder)
    assert expected in page.text
    assert "nvfp4_all_qad" in page.text
    if part != "verdict.json":
        assert "95.0 %" in page.text


def test_a_run_that_has_only_begun(tmp_path: Path, run_folder: Path) -> None:
    folder = tmp_path / "young"
    folder.mkdir()
    shutil.copy(run_folder / "recipe.yaml", folder)
    page = read(folder)
    assert "NO VERDICT" in page.text and page.text.count("is not there") == 6
    assert page.row("bf16").startswith("bf16 reference persona – –")


def test_a_damaged_file_and_a_torn_line_are_named(run_folder: Path) -> None:
    (run_folder / "divergence.json").write_text('{"a": ')
    with (run_folder / "sft" / "log.jsonl").open("a") as file:
        file.write('{"step": 10')
    page = read(run_folder)
    assert "divergence.json cannot be read" in page.text
    assert "sft/log.jsonl line 109 is no JSON object: left out" in page.text


def test_a_rate_of_too_few_cases(run_folder: Path) -> None:
    verdict = json.loads((run_folder / "verdict.json").read_text())
    few: dict[str, Any] = {"passed": 2, "n": 3, "rate": None, "low": None, "high": None, "reason": "too few: 3 cases"}
    verdict["arms"]["base"]["overall"] = verdict["arms"]["base"]["categories"]["topic_switch"] = few
    (run_folder / "verdict.json").write_text(json.dumps(verdict))
    page = read(run_folder)
    assert "too few: 3 cases" in page.text and "2/3 too few" in page.row("topic_switch")


def test_what_is_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run to report on"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_curves_lie_where_the_numbers_say(run_folder: Path) -> None:
    page = read(run_folder)
    line = next(
        str(attributes["points"])
        for tag, attributes in page.tags
        if tag == "polyline" and attributes["class"] == "line s1"
    )
    points = [tuple(map(float, pair.split(","))) for pair in line.split()]
    assert len(points) == 102
    # The plot is 62..546 wide for steps 0..102 and 210..14 high for 0..3 (largest loss 2.51, so the grid ends at 3).
    rows = [json.loads(row) for row in (run_folder / "sft/log.jsonl").read_text().splitlines()]
    for (x, y), row in zip(points, (row for row in rows if "loss" in row), strict=True):
        assert x == pytest.approx(62 + 484 * row["step"] / 102, abs=0.06)
        assert y == pytest.approx(210 - 196 * row["loss"] / 3, abs=0.06)


def test_rate_bars_lie_where_the_numbers_say(run_folder: Path) -> None:
    page = read(run_folder)
    # The track runs from 4 (0 %) to 156 (100 %); the row of the candidate is the last one, the floor is 90 %.
    shapes = [(tag, attributes) for tag, attributes in page.tags if attributes.get("class") in ("value", "interval")]
    (_, interval), (_, value) = shapes[-2:]
    assert float(str(value["cx"])) == pytest.approx(4 + 1.52 * 95.0, abs=0.06)
    assert float(str(interval["x1"])) == pytest.approx(4 + 1.52 * 89.52, abs=0.06)
    assert float(str(interval["x2"])) == pytest.approx(4 + 1.52 * 97.69, abs=0.06)
    floors = [
        attributes for tag, attributes in page.tags if attributes.get("class") == "floor" and attributes["y2"] == "17"
    ]
    assert [float(str(each["x1"])) for each in floors] == pytest.approx([4 + 1.52 * 90] * 4, abs=0.06)


def test_a_wide_range_is_drawn_logarithmically(run_folder: Path) -> None:
    rows = [{"step": step, "kl": 10.0 ** (-step)} for step in range(4)]
    (run_folder / "distill/all/log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = read(run_folder)
    lines = [str(attributes["points"]) for tag, attributes in page.tags if tag == "polyline"]
    heights = [float(pair.split(",")[1]) for pair in lines[-1].split()]
    gaps = [b - a for a, b in itertools.pairwise(heights)]
    assert gaps == pytest.approx([196 / 3] * 3, abs=0.11)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, 102, [0, 50, 100, 150]),
        (0.0, 0.0089, [0, 0.002, 0.004, 0.006, 0.008, 0.01]),
        (-3, 3, [-4, -2, 0, 2, 4]),
        (5, 5, [2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_ticks_are_round_and_cover(low: float, high: float, expected: list[float]) -> None:
    assert nice_ticks(low, high) == expected


def test_formats() -> None:
    seconds = {0.42: "0.4 s", 9.96: "10 s", 59.4: "59 s", 59.6: "1 min 00 s", 185: "3 min 05 s", 3599.4: "59 min 59 s"}
    assert [duration(value) for value in seconds] == list(seconds.values())
    assert (duration(7385), duration(None)) == ("2 h 03 min", "–")
    assert [size(n) for n in (None, 12, 2_600_000, 59_000_000_000)] == ["–", "12 B", "2.6 MB", "59 GB"]
