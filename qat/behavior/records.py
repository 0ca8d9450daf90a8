"""The records of a behaviour run: a case of a suite, and the result of asking it once.

Results are JSON lines: one line per (case, sampling, seed), appended once. `read_results` forgives a torn last line,
which is what a killed process leaves, and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

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


class _Written(_Record):
    """A record that people write; a number in the place of a text is that text (`{{hour}}` stays a number)."""

    model_config = ConfigDict(coerce_numbers_to_str=True)


class CheckSpec(BaseModel):
    """A check by name with its parameters beside it: `{check: max_sentences, n: 2}`."""

    model_config = ConfigDict(extra="allow", frozen=True)
    check: str

    @property
    def params(self) -> dict[str, Any]:
        """Everything but the name; validated by the check itself when it is bound."""
        return dict(self.model_extra or {})


class ToolResult(_Written):
    """What a tool returns to one kind of call.

    Attributes:
        result: The text that is fed.
        call: Only to the n-th call of this tool in the case, from 1; None: to any.
        arguments: Only to calls whose arguments meet these matchers (those of the check `calls`).
    """

    result: str
    call: Annotated[int, Field(ge=1)] | None = None
    arguments: dict[str, Any] = Field(default_factory=dict)


ToolScript = str | list[str | ToolResult]
"""One text for every call, or entries of which the first that fits answers; a plain text at place n fits the n-th call
of the tool."""


class Turn(_Written):
    """One turn of the user, and what the reply to it must hold.

    Attributes:
        user: What the user says.
        tool_results: Looked at before those of the case.
        checks: On what the model wrote in this turn.
    """

    user: Annotated[str, Field(min_length=1)]
    tool_results: dict[str, ToolScript] = Field(default_factory=dict)
    checks: list[CheckSpec] = Field(default_factory=list)


class Case(_Written):
    """One conversation prefix, what its tools answer, and what the reply must hold.

    Attributes:
        id: Unique in the suite.
        category: What the case probes; rates are given per category.
        messages: OpenAI messages; earlier assistant and tool turns are allowed. The last one is of the user or of a
            tool, unless `turns` follow: then it is of neither.
        turns: What the user says, turn by turn, each after the model's reply to the one before.
        tools: OpenAI function tools; None in a file means the persona's.
        tool_results: Tool name to what the tool returns when the model calls it.
        unscripted: What a call gets for which no result is scripted; None: the conversation ends there and is judged as
            it is.
        checks: All of them must pass, on all that the model wrote.
        reference: An answer to compare with; a `judge` that names none of its own takes it.
        weight: Share in the weighted rates, relative to the other cases.
        tags: Free words for people.
    """

    id: Annotated[str, Field(min_length=1)]
    category: Annotated[str, Field(min_length=1)]
    messages: list[dict[str, Any]]
    turns: list[Turn] = Field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    tool_results: dict[str, ToolScript] = Field(default_factory=dict)
    unscripted: str | None = None
    checks: list[CheckSpec] = Field(default_factory=list)
    reference: str | None = None
    weight: Annotated[float, Field(gt=0)] = 1.0
    tags: list[str] = Field(default_factory=list)

    @field_validator("messages")
    @classmethod
    def _prefix(cls, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        messages = [
            {**message, "content": str(message["content"])} if type(message.get("content")) in (int, float) else message
            for message in messages
        ]
        for position, message in enumerate(messages):
            role = message.get("role")
            if role not in ("system", "user", "assistant", "tool"):
                raise ValueError(f"messages[{position}].role is {role!r}, not system, user, assistant or tool")
            if role == "system" and position:
                raise ValueError(f"messages[{position}] is a system message; only the first may be one")
            if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
                raise ValueError(f"messages[{position}] ({role}) has no text and no tool call")
        return messages

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if not self.messages and not self.turns:
            raise ValueError("messages is empty, and no turns follow")
        last = self.messages[-1]["role"] if self.messages else None
        if self.turns and last in ("user", "tool"):
            raise ValueError(f"the last of messages is of {last!r} and unanswered; let it be the first of turns")
        if not self.turns and last not in ("user", "tool"):
            raise ValueError(f"the last message is of {last!r}; the model answers a user or a tool")
        if not self.checks and not any(turn.checks for turn in self.turns):
            raise ValueError("checks: at least one is needed, of the case or of a turn")
        return self

    def canonical(self) -> dict[str, Any]:
        """The case as it is hashed.

        Keys that came later than the first format stand there only where a case uses them: suites without them keep
        the hash that their published answers carry.
        """
        found = self.model_dump(mode="json")
        return {key: value for key, value in found.items() if key not in _LATER or value}


_LATER = ("turns", "unscripted", "reference")


class FailedCheck(_Record):
    """A check that did not pass, and why in words."""

    check: str
    detail: str


class CaseResult(_Record):
    """What the model wrote for one case, sampling and seed, and how it was judged.

    Attributes:
        produced: The assistant messages in order, each with `content`, `tool_calls` where it called, `finish_reason`,
            in a case with turns `turn` from 1, and `token_ids` where the server was asked for them.
        passed: True where every check passed.
        latency_s: Wall seconds that the server took for its answers to this case, without failed tries and pauses.
        first_token_s: To the first token of the first answer; None where the answers were not streamed.
        completion_tokens: As the server counts them, over all rounds.
        error: Why there is no answer that could be judged, as `kind: details`; such a result counts in no rate.
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
    first_token_s: float | None = None
    error: str | None = None

    @property
    def error_kind(self) -> str | None:
        """What went wrong in a word or two (`timeout`, `HTTP 400`, `not JSON`), to count by; None without an error."""
        return None if self.error is None else self.error.partition(":")[0]

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

    Two result files may be compared, and a file may be continued, only where these agree. Whether answers were streamed
    belongs to it: servers parse tool calls of a stream by other code.
    """

    suite: str
    version: str
    sha256: str
    model: str
    max_tokens: int
    samplings: dict[str, dict[Literal["temperature", "top_p"], float]]
    stream: bool = False


def meta_path(results: Path) -> Path:
    """Where the description of a result file lies."""
    return results.with_suffix(".meta.json")


def divergence_path(results: Path) -> Path:
    """Where the divergence of an arm from the reference lies, beside its results."""
    return results.with_suffix(".divergence.json")


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
