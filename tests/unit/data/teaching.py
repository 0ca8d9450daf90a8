"""A teacher by rule for tests: writes scenarios, plays tools, and answers as the persona; each part can be replaced."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qat.behavior.suite import Suite, load_suite
from qat.data.generate.teacher import Teacher
from qat.data.schema import Persona, load_persona
from tests.unit.behavior.stub_server import call, completion

Part = Callable[[dict[str, Any], int], dict[str, Any]]

SUITE = """
name: small
version: "1"
persona: annie_tiny
common_checks: [{check: not_empty}, {check: no_emoji}, {check: max_sentences, n: 2}]
cases:
  - id: memory-1
    category: honest_memory
    messages: [{role: user, content: What did I say about my green bike from Hassan?}]
    tool_results: {search_memory: "[]"}
    checks: [{check: calls, tool: search_memory}, {check: mentions, any: [no memory]}]
  - id: memory-2
    category: honest_memory
    messages: [{role: user, content: Do you recall the loan of 4200 rupees?}]
    tool_results: {search_memory: "[]"}
    checks: [{check: calls, tool: search_memory, arguments: {query: {contains: loan}}}]
  - id: voice-1
    category: concise_voice
    messages: [{role: user, content: Tell me about Malvek.}]
    checks: [{check: no_call}]
"""


def small_suite(folder: Path) -> Suite:
    path = folder / "small.yaml"
    path.write_text(SUITE, encoding="utf-8")
    return load_suite(path)


def annie() -> Persona:
    return load_persona("annie_tiny")


def teacher(url: str, **more: Any) -> Teacher:
    settings: dict[str, Any] = {
        "url": url,
        "model": "m",
        "categories": {"honest_memory": {"count": 2}, "concise_voice": {"count": 2}},
        "concurrency": 1,
    }
    return Teacher.model_validate(settings | more)


def part_of(body: dict[str, Any]) -> str:
    """Which of its three parts the teacher is asked to play."""
    first = body["messages"][0]["content"]
    if first.startswith("You write the user's side"):
        return "user"
    return "tool" if first.startswith("You play a tool") else "persona"


def with_usage(answer: dict[str, Any]) -> dict[str, Any]:
    return answer | {"usage": {"prompt_tokens": 100, "completion_tokens": 10}}


WORDS = "saffron quilt lantern walnut ribbon kettle orchid anchor pepper violin marble copper".split()


def scenario(body: dict[str, Any], number: int) -> dict[str, Any]:
    word = WORDS[number % len(WORDS)]
    memory = "honest_memory" in body["messages"][0]["content"]
    turn = f"Have I ever spoken of a {word} {number}?" if memory else f"What makes a {word} number {number} good?"
    return completion(json.dumps({"turns": [turn], "world": f"nothing is known of {word}"}))


def tool(body: dict[str, Any], number: int) -> dict[str, Any]:
    return completion("```json\n[]\n```")


def persona(body: dict[str, Any], number: int) -> dict[str, Any]:
    last = body["messages"][-1]
    if last["role"] == "user" and "spoken of" in last["content"]:
        return completion(None, [call("search_memory", json.dumps({"query": last["content"][24:]}))], "tool_calls")
    return completion("No memory of that.")  # short, so that it wears out never


def by_parts(**parts: Part) -> Callable[[dict[str, Any], int], tuple[int, dict[str, Any]]]:
    """A stub's answer, by part; `user`, `tool` and `persona` replace the defaults."""
    table: dict[str, Part] = {"user": scenario, "tool": tool, "persona": persona} | parts

    def answer(body: dict[str, Any], number: int) -> tuple[int, dict[str, Any]]:
        return 200, with_usage(table[part_of(body)](body, number))

    return answer
