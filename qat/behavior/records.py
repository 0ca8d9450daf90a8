"""The records of a behaviour run: a case of a suite, and the result of asking it once.

Results are JSON lines: one line per (case, sampling, seed), appended once. `read_results` forgives a torn last line,
which is what a killed process leaves, and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from qat.errors import UserError

CATEGORIES = (
    "topic_switch",
    "direct_action",
    "concise_voice",
    "honest_memory",
    "rajesh_context",
    "kannada_culture",
    "mixed_multiturn",
    "no_emoji_no_markdown",
    "tool_result_responses",
    "no_followup_questions",
)
"""The ten categories of persona suites; a suite of other contents may name its own."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CheckSpec(BaseModel):
    """A check by name with its parameters beside it: `{check: max_sentences, n: 2}`."""

    model_config = ConfigDict(extra="allow", frozen=True)
    check: str

    @property
    def params(self) -> dict[str, Any]:
        """Everything but the name; validated by the check itself when it is bound."""
        return dict(self.model_extra or {})


class Case(_Record):
    """One conversation prefix, what its tools answer, and what the reply must hold.

    Attributes:
        id: Unique in the suite.
        category: What the case probes; rates are given per category.
        messages: OpenAI messages, the last one of the user or of a tool; earlier assistant and tool turns are allowed.
        tools: OpenAI function tools; None in a file means the persona's.
        tool_results: Tool name to the text that the tool returns when the model calls it.
        checks: All of them must pass.
        weight: Share in the weighted rates, relative to the other cases.
        tags: Free words for people.
    """

    id: Annotated[str, Field(min_length=1)]
    category: Annotated[str, Field(min_length=1)]
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    tools: list[dict[str, Any]] | None = None
    tool_results: dict[str, str] = Field(default_factory=dict)
    checks: Annotated[list[CheckSpec], Field(min_length=1)]
    weight: Annotated[float, Field(gt=0)] = 1.0
    tags: list[str] = Field(default_factory=list)

    @field_validator("messages")
    @classmethod
    def _prefix(cls, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for position, message in enumerate(messages):
            role = message.get("role")
            if role not in ("system", "user", "assistant", "tool"):
                raise ValueError(f"messages[{position}].role is {role!r}, not system, user, assistant or tool")
            if role == "system" and position:
                raise ValueError(f"messages[{position}] is a system message; only the first may be one")
            if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
                raise ValueError(f"messages[{position}] ({role}) has no text and no tool call")
        if messages[-1]["role"] not in ("user", "tool"):
            raise ValueError(f"the last message is of {messages[-1]['role']!r}; the model answers a user or a tool")
        return messages


class FailedCheck(_Record):
    """A check that did not pass, and why in words."""

    check: str
    detail: str


class CaseResult(_Record):
    """What the model wrote for one case, sampling and seed, and how it was judged.

    Attributes:
        produced: The assistant messages in order, each with `content`, `tool_calls` where it called, and
            `finish_reason`.
        passed: True where every check passed.
        latency_s: Wall seconds from the first request to the last answer of this case, retries included.
        completion_tokens: As the server counts them, over all rounds.
        error: Why the server refused the case (HTTP 4xx); such a result is no answer: it counts in no rate.
    """

    case: str
    category: str
    arm: str
    sampling: str
    seed: int
    produced: list[dict[str, Any]]
    passed: bool
    failed_checks: list[FailedCheck]
    latency_s: float
    completion_tokens: int
    error: str | None = None

    @property
    def key(self) -> ResultKey:
        """What makes the result unique in its file."""
        return ResultKey(self.case, self.sampling, self.seed)


class ResultKey(NamedTuple):
    """One question: a case under a sampling with a seed."""

    case: str
    sampling: str
    seed: int


class ResultFile(NamedTuple):
    """The whole lines of a result file.

    Attributes:
        results: The latest result of every key.
        whole_bytes: Length of the file up to the end of its last whole line; what follows is torn.
    """

    results: dict[ResultKey, CaseResult]
    whole_bytes: int


def read_results(path: Path) -> ResultFile:
    """Read a result file; where a case was asked again after an error, the later result stands.

    Raises:
        UserError: The file is missing or unreadable, or a line that is not the torn last one is no result.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError("The result file cannot be read.", where=str(path), value=str(error)) from error
    results: dict[ResultKey, CaseResult] = {}
    whole = 0
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            result = CaseResult.model_validate_json(line)
        except ValidationError as error:
            raise UserError(
                "A line of the result file is no result.",
                where=f"{path}, line {number}",
                value=str(error.errors()[0]["msg"]),
                remedy="remove that line: the case is asked again",
            ) from error
        results[result.key] = result
        whole += len(line)
    return ResultFile(results, whole)


class ResultMeta(_Record):
    """What a result file was made with; lies beside it as `<arm>.meta.json`.

    Two result files may be compared, and a file may be continued, only where these agree.
    """

    suite: str
    version: str
    sha256: str
    model: str
    max_tokens: int
    samplings: dict[str, dict[Literal["temperature", "top_p"], float]]


def meta_path(results: Path) -> Path:
    """Where the description of a result file lies."""
    return results.with_suffix(".meta.json")


def read_meta(results: Path) -> ResultMeta | None:
    """The description of a result file, or None where it has none.

    Raises:
        UserError: The description exists and is not readable as one.
    """
    path = meta_path(results)
    if not path.is_file():
        return None
    try:
        return ResultMeta.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise UserError(
            "The description of the results is damaged.", where=str(path), remedy="remove both files and ask again"
        ) from error


def canonical_json(value: object) -> bytes:
    """JSON with sorted keys and no spaces: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=_plain).encode()


def _plain(value: object) -> object:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"no JSON for {type(value).__name__}")
