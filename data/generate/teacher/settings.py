"""How a teacher is reached, what it may cost, and how many conversations of which category it is to give.

One YAML file, read whole and with all its faults at once. It holds no key: `key_env` names the environment variable
that does.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from qat.behavior.checks.language import LANGUAGES
from qat.errors import UserError

ABOUT: dict[str, str] = {
    "topic_switch": "in the last turn the user drops the subject for an unrelated one, which alone is to be answered",
    "direct_action": "the user asks for something that one of the tools does; the call comes at once",
    "concise_voice": "an open question that invites a long answer; the reply stays short enough to be spoken",
    "honest_memory": "the user refers to something he said before; mostly the memory holds nothing about it",
    "rajesh_context": "a question about the user himself, answered from the assistant's prompt without a tool",
    "kannada_culture": "a question about Kannada language, food, festivals, films, music or places of Karnataka",
    "mixed_multiturn": "two or three turns that mix talk, an action by a tool and a question of memory or fact",
    "no_emoji_no_markdown": "the user asks for a list, a table, bold type or emoji; the reply is plain speech",
    "tool_result_responses": "the user asks for what a tool must look up; the reply says what it found, in plain words",
    "no_followup_questions": "small talk or a remark about the user's day; the reply asks nothing back",
}
"""What the ten categories of persona suites are about; a category of your own says it in `about`."""


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Quota(_Block):
    """How many conversations of a category, and what they are about.

    Attributes:
        count: Accepted conversations to reach.
        about: One line for the teacher; may be left out for the categories of `ABOUT`.
    """

    count: Annotated[int, Field(gt=0)]
    about: str = ""


class Price(_Block):
    """What a million tokens cost, in any currency."""

    input: Annotated[float, Field(ge=0)]
    output: Annotated[float, Field(ge=0)]


class Limits(_Block):
    """Where generation stops, over all calls for one file; requests under way are finished and may go beyond.

    Attributes:
        requests: HTTP requests that were answered.
        tokens: Prompt and completion tokens, as the server counts them.
        cost: By `price`.
    """

    requests: Annotated[int, Field(gt=0)] | None = None
    tokens: Annotated[int, Field(gt=0)] | None = None
    cost: Annotated[float, Field(gt=0)] | None = None


class Teacher(_Block):
    """A model behind an OpenAI-compatible URL, and what is wanted of it.

    Attributes:
        url: Root of the server, with or without `/v1`.
        model: Name of the model there.
        key_env: Environment variable that holds the key; None sends none.
        categories: Category to quota; not needed where failed cases say what is wanted.
        seed: Of the requests and of the users' manners.
        temperature: Of every request.
        top_p: Of every request.
        max_tokens: Longest answer.
        length_key: What the server calls that limit.
        extra: Further fields of every request body, such as `chat_template_kwargs`.
        timeout_s: Longest wait for one whole answer.
        concurrency: Conversations under way at once.
        requests_per_minute: Most requests begun in a minute, evenly spaced; None: as fast as they are answered.
        revisions: How often a reply that fails a check is handed back with what failed.
        attempts: Most tries for each wanted conversation.
        languages: What user and assistant may speak (ISO 639-1); empty: anything.
        alike: Most accepted replies that may say nearly the same; what comes after must be said in other words.
        price: For the cost in the report and `limits.cost`.
        limits: Where to stop.
    """

    url: str
    model: Annotated[str, Field(min_length=1)]
    key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    categories: dict[str, Quota] = Field(default_factory=dict)
    seed: int = 0
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.8
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    max_tokens: Annotated[int, Field(gt=0)] = 512
    length_key: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    extra: dict[str, Any] = Field(default_factory=dict)
    timeout_s: Annotated[float, Field(gt=0)] = 180.0
    concurrency: Annotated[int, Field(gt=0, le=256)] = 4
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    revisions: Annotated[int, Field(ge=0)] = 2
    attempts: Annotated[int, Field(gt=0)] = 4
    languages: tuple[str, ...] = ()
    alike: Annotated[int, Field(gt=0)] = 10
    price: Price | None = None
    limits: Limits = Limits()

    @field_validator("url")
    @classmethod
    def _root(cls, url: str) -> str:
        scheme, _, rest = url.partition("://")
        if scheme not in ("http", "https") or not rest:
            raise ValueError(f"{url!r} is no HTTP address")
        if "@" in rest.partition("/")[0]:
            raise ValueError("no name or password in the address: key_env names the variable that holds the key")
        return url.rstrip("/").removesuffix("/v1")

    @field_validator("languages")
    @classmethod
    def _known(cls, languages: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [code for code in languages if code not in LANGUAGES]:
            raise ValueError(f"{', '.join(unknown)} is not known; known: {', '.join(LANGUAGES)}")
        return languages

    @field_validator("extra")
    @classmethod
    def _nothing_of_ours(cls, extra: dict[str, Any]) -> dict[str, Any]:
        own = {"model", "messages", "tools", "tool_choice", "seed", "temperature", "top_p", "stream", "n"}
        if taken := sorted(own & extra.keys()):
            raise ValueError(f"{', '.join(taken)} cannot be set here")
        return extra

    @model_validator(mode="after")
    def _whole(self) -> Self:
        for name, quota in self.categories.items():
            if not quota.about and name not in ABOUT:
                raise ValueError(f"categories.{name}: about is missing; say in one line what its conversations hold")
        if self.limits.cost is not None and self.price is None:
            raise ValueError("limits.cost needs price: what a million tokens cost")
        return self

    def about(self, category: str) -> str:
        """What a category's conversations are about."""
        quota = self.categories.get(category)
        return (quota.about if quota else "") or ABOUT.get(category, category.replace("_", " "))

    def key(self) -> str | None:
        """The key.

        Raises:
            UserError: The environment variable is not set.
        """
        if self.key_env is None:
            return None
        key = os.environ.get(self.key_env, "").strip()
        if not key:
            raise UserError(
                "The key of the teacher is not in the environment.",
                where="key_env",
                value=self.key_env,
                remedy=f"export {self.key_env}=…, or leave key_env out for a server that wants none",
            )
        return key


def load_teacher(path: Path) -> Teacher:
    """Read a teacher's file.

    Raises:
        UserError: It cannot be read, or has faults (all of them at once).
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError("The teacher's file cannot be read.", where=str(path), value=str(error)) from error
    if not isinstance(content, dict):
        raise UserError("The teacher's file holds no mapping.", where=str(path), remedy="docs/data.md shows one")
    try:
        return Teacher.model_validate(content)
    except ValidationError as error:
        faults = [_fault(fault["loc"], fault["msg"]) for fault in error.errors()]
        raise UserError(
            f"The teacher's file has {len(faults)} fault{'s' * (len(faults) > 1)}.",
            where=str(path),
            value="\n          ".join(faults),
        ) from error


def _fault(place: tuple[int | str, ...], message: str) -> str:
    key, problem = ".".join(map(str, place)), message.removeprefix("Value error, ")
    if "key" in key.lower() and problem == "Extra inputs are not permitted":
        problem = "keys stand in no file: key_env names the environment variable that holds it"
    return f"{key}: {problem}" if key else problem
