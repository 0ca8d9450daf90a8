"""JUnit XML, as CI systems read it: one test case per case of the suite."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import regex

from qat.behavior.records import CaseResult, ResultKey

# XML 1.0 has no way to write these, not even escaped; a model can.
_ILLEGAL = regex.compile(r"[^\t\n\r\u0020-\uD7FF\uE000-\uFFFD\U00010000-\U0010FFFF]")


class JunitCase(NamedTuple):
    """One case of the candidate.

    Attributes:
        name: Case id.
        category: Becomes the class name.
        seconds: Latency over all seeds.
        problems: What failed; empty where the case passed.
        error: Why the server refused the case, or None.
        reply: What the model said where it failed.
        asked: False where a limited sampling left the case out.
    """

    name: str
    category: str
    seconds: float
    problems: list[str]
    error: str | None
    reply: str
    asked: bool


def junit_cases(
    results: Mapping[ResultKey, CaseResult], categories: Mapping[str, str], sampling: str
) -> list[JunitCase]:
    """One entry per case under one sampling; with several seeds the case fails where any of them does.

    Args:
        results: Answers of one arm.
        categories: Category of every case of the suite, in its order.
        sampling: The one that counts.
    """
    by_case: dict[str, list[CaseResult]] = {}
    for key, result in results.items():
        if key.sampling == sampling:
            by_case.setdefault(key.case, []).append(result)
    made = []
    for name, category in categories.items():
        found = by_case.get(name, [])
        problems = [f"seed {r.seed}: {f.check}: {f.detail}" for r in found for f in r.failed_checks]
        spoken = [str(message.get("content") or "") for r in found if not r.passed for message in r.produced]
        made.append(
            JunitCase(
                name,
                category,
                sum(r.latency_s for r in found),
                problems,
                next((r.error for r in found if r.error), None),
                "\n".join(text for text in spoken if text),
                asked=bool(found),
            )
        )
    return made


def junit_xml(name: str, cases: Sequence[JunitCase], properties: Mapping[str, str]) -> bytes:
    """The file's content: one `testsuite` with failures (checks), errors (the server refused), skipped (not asked)."""
    errors = sum(case.error is not None for case in cases)
    failures = sum(bool(case.problems) and case.error is None for case in cases)
    root = ElementTree.Element("testsuites")
    suite = ElementTree.SubElement(
        root,
        "testsuite",
        name=_legal(name),
        tests=str(len(cases)),
        failures=str(failures),
        errors=str(errors),
        skipped=str(sum(not case.asked for case in cases)),
        time=f"{sum(case.seconds for case in cases):.3f}",
    )
    block = ElementTree.SubElement(suite, "properties")
    for key, value in properties.items():
        ElementTree.SubElement(block, "property", name=key, value=_legal(value))
    for case in cases:
        element = ElementTree.SubElement(
            suite, "testcase", name=_legal(case.name), classname=_legal(case.category), time=f"{case.seconds:.3f}"
        )
        if not case.asked:
            ElementTree.SubElement(element, "skipped", message="not asked")
        elif case.error is not None:
            ElementTree.SubElement(element, "error", message=_legal(case.error))
        elif case.problems:
            failure = ElementTree.SubElement(element, "failure", message=_legal(case.problems[0]))
            failure.text = _legal("\n".join([*case.problems, "", case.reply]))
    ElementTree.indent(root)
    return bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)) + b"\n"


def _legal(text: str) -> str:
    return str(_ILLEGAL.sub("�", text))
