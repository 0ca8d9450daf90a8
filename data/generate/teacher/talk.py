"""One conversation by a teacher, in three parts that never see each other's instructions.

The **user**: asked for a scenario, the teacher writes the user's turns of a category and a note of what the tools will
find. The **persona**: it then answers each turn under the production prompt with the production tools and nothing else,
as the served model will. The **tools**: each call is answered by the teacher as that tool, which sees its definition,
the arguments, the scenario's note and the earlier results; no tool is really run.

Every reply is held against the checks that the suite makes of any reply of the category. One that fails is asked for
again, with what failed, in a review at the end of the prompt that no record keeps; when the revisions are used up the
conversation is rejected.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Sequence
from random import Random
from typing import Any, NamedTuple, cast

from qat.behavior.checks import BoundCheck, CheckError, Reply
from qat.behavior.conversation import MAX_TOOL_ROUNDS
from qat.data.schema import Conversation, Persona, Tool, argument_faults

Message = dict[str, Any]
Ask = Callable[[Sequence[Message], Sequence[Tool]], Awaitable[Message]]
"""Sends messages and the tools offered; gives the assistant message."""
Further = Callable[[str], list[tuple[str, str]]]
"""What is wrong with a spoken text beyond the checks, as (name, detail)."""

MOST_TURNS = 4
"""User turns of a conversation."""
LONGEST_TURN = 600
"""Characters of a user turn."""
LONGEST_RESULT = 4000
"""Characters of a tool's result."""
LONGEST_REPLY = 8000
"""Characters of a reply: more is no speech, whatever the suite's checks make of it."""

_ABOUT_CALLS = ("calls", "parallel_calls", "no_call", "wrong_tool")
_MANNERS = (
    "in a hurry", "relaxed", "tired", "precise", "chatty", "a little annoyed", "distracted", "cheerful", "on the road",
    "half asleep", "at work", "cooking", "with guests", "out for a walk", "formal", "careless about grammar",
)  # fmt: skip

_SCENARIO = """\
You write the user's side of a conversation with an assistant; another model writes the assistant's. What follows is
data: the assistant's prompt and its tools, as JSON.
{assistant}

Category of the conversation: {category}. {about}.
The user is {manner}. He does not know the assistant's prompt, never quotes it, and speaks as people speak.
Choose people, places, numbers and subjects of your own that fit him.{lesson}{avoid}
Answer with one JSON object and nothing else:
{{"turns": ["what the user says first", …], "world": "one or two sentences: what the tools find or do if called"}}
One turn, or as many as the category asks for, at most {most}. The user's turns must make sense whatever exactly the
assistant answers in between."""
_TOOL = """\
You play a tool that an assistant calls; you are not the assistant. Definition: {definition}
What is true in this scenario: {world}
Earlier calls and their results: {earlier}
Answer the call with what the tool returns and nothing else: JSON as a program writes it, without comment or code fence;
an empty list where nothing is found. At most 600 characters."""
_REVIEW = """\


<review>
Your last draft of the next reply cannot be used. The draft, as JSON: {draft}
What is wrong with it: {faults}
Write that reply again so that none of this holds. Do not mention this review.
</review>"""


class Rejected(Exception):
    """The conversation cannot be used: `reason` is counted by, `detail` is for people."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason = reason
        self.detail = detail[:500]
        super().__init__(f"{reason}: {detail}" if detail else reason)


class Scenario(NamedTuple):
    """The user's turns, and what the tools will find."""

    turns: tuple[str, ...]
    world: str


async def invent(
    ask: Ask, persona: Persona, category: str, about: str, *, rng: Random, lesson: str = "", avoid: Sequence[str] = ()
) -> Scenario:
    """Have the user's side written.

    Args:
        ask: To the teacher.
        persona: Whose user it is.
        category: Name.
        about: What conversations of the category hold.
        rng: Of the user's manner.
        lesson: What this conversation is to exercise beyond its category.
        avoid: Turns that were used and are not to be varied.

    Raises:
        Rejected: The teacher wrote no scenario.
    """
    assistant = json.dumps({"prompt": persona.system_prompt, "tools": persona.tools}, ensure_ascii=False)
    text = _SCENARIO.format(
        assistant=assistant,
        category=category,
        about=about,
        manner=rng.choice(_MANNERS),
        lesson=f"\n{lesson}" if lesson else "",
        avoid=f"\nUsed already, so write of something else: {json.dumps(list(avoid), ensure_ascii=False)}"
        if avoid
        else "",
        most=MOST_TURNS,
    )
    answer = await ask([{"role": "user", "content": text}], ())
    content = answer["content"] or ""
    found = _json_object(content)
    turns = found.get("turns") if found else None
    if (
        not isinstance(turns, list)
        or not 1 <= len(turns) <= MOST_TURNS
        or not all(isinstance(t, str) and t.strip() for t in turns)
    ):
        raise Rejected("scenario", f"no JSON object with one to four turns: {content[:200]!r}")
    if longest := [turn for turn in turns if len(turn) > LONGEST_TURN]:
        raise Rejected("scenario", f"a turn of {len(longest[0])} characters")
    world = found.get("world") if found else None
    return Scenario(tuple(turn.strip() for turn in turns), world if isinstance(world, str) else "")


def _json_object(text: str) -> dict[str, Any] | None:
    """The outermost JSON object of a text; models like to put one into a code fence."""
    start, end = text.find("{"), text.rfind("}")
    try:
        value = json.loads(text[start : end + 1]) if 0 <= start < end else None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


async def play(
    ask: Ask, persona: Persona, scenario: Scenario, checks: Sequence[BoundCheck], revisions: int, further: Further
) -> list[Message]:
    """Play a scenario.

    Args:
        ask: To the teacher.
        persona: Whose prompt and tools are used.
        scenario: The user's side.
        checks: On what the persona writes in each turn.
        revisions: How often a message that fails is asked for again.
        further: What else is wrong with a spoken text, as (name, detail).

    Returns:
        The messages of the conversation, system prompt first, arguments as mappings.

    Raises:
        Rejected: A message still fails after all revisions, or the tools are called without end.
    """
    talk = _Talk(ask, persona, scenario.world, checks, revisions, further)
    for turn in scenario.turns:
        await talk.turn(turn)
    return talk.messages


class _Talk:
    """The conversation under way."""

    def __init__(
        self, ask: Ask, persona: Persona, world: str, checks: Sequence[BoundCheck], revisions: int, further: Further
    ) -> None:
        self.messages: list[Message] = [{"role": "system", "content": persona.system_prompt}]
        self._ask = ask
        self._persona = persona
        self._world = world
        self._checks = checks
        self._revisions = revisions
        self._further = further
        self._earlier: list[dict[str, Any]] = []

    async def turn(self, user: str) -> None:
        """The user's turn, calls and results, and the reply."""
        self.messages.append({"role": "user", "content": user})
        context = list(self.messages)
        produced: list[Message] = []
        fed: list[str] = []
        for _ in range(MAX_TOOL_ROUNDS + 1):
            message = await self._written(context, produced, fed)
            produced.append(message)
            calls = message.get("tool_calls") or []
            self.messages.append(self._kept(message))
            if not calls:
                return
            for call in self.messages[-1]["tool_calls"]:
                result = await self._result(call["function"])
                fed.append(result)
                self.messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
        raise Rejected("calls without end", f"a call after {MAX_TOOL_ROUNDS} rounds of results")

    async def _written(self, context: Sequence[Message], produced: Sequence[Message], fed: Sequence[str]) -> Message:
        """The next message of the persona, asked for again while it fails."""
        review = ""
        for _ in range(self._revisions + 1):
            system = {"role": "system", "content": self._persona.system_prompt + review}
            said = [_on_the_wire(message) for message in self.messages[1:]]
            answer = await self._ask([system, *said], self._persona.tools)
            message = {key: value for key, value in answer.items() if key != "reasoning_content"}
            faults = self._faults(message, context, produced, fed)
            if not faults:
                return message
            draft = {key: message[key] for key in ("content", "tool_calls") if message.get(key)}
            review = _REVIEW.format(
                draft=json.dumps(draft, ensure_ascii=False)[:2000],
                faults="; ".join(f"{name}: {detail}" if detail else name for name, detail in faults)[:1000],
            )
        raise Rejected(faults[0][0], faults[0][1])

    def _faults(
        self, message: Message, context: Sequence[Message], produced: Sequence[Message], fed: Sequence[str]
    ) -> list[tuple[str, str]]:
        """What is wrong with a message, as (name, detail)."""
        text, calls = message["content"] or "", Reply([message]).calls
        if message["finish_reason"] == "length":
            return [("cut", "the answer reached the longest length")]
        if not text.strip() and not calls:
            return [("empty", "neither text nor call")]
        if len(text) > LONGEST_REPLY:
            return [("too long", f"{len(text)} characters")]
        for call in calls:
            if call.arguments is None:
                return [("call", f"the arguments of {call.name} are no JSON object: {call.raw[:200]}")]
            if problems := argument_faults(call.name, call.arguments, self._persona.tools):
                return [("call", "; ".join(problems))]
        if not calls:
            return self._judged(self._checks, [*produced, message], context, fed) + self._further(text)
        # A call is judged at once by what forbids it, and the text beside it by the manners; what wants a call waits
        # for the reply as a whole.
        found = self._judged([check for check in self._checks if check.name == "no_call"], [message], context, fed)
        if text.strip():
            manners = [check for check in self._checks if check.name not in _ABOUT_CALLS]
            found += self._judged(manners, [{"content": text, "finish_reason": "stop"}], context, fed)
        return found

    def _judged(
        self, checks: Sequence[BoundCheck], produced: Sequence[Message], context: Sequence[Message], fed: Sequence[str]
    ) -> list[tuple[str, str]]:
        reply = Reply(produced, context, tuple(fed), self._persona.tools)
        found = []
        for check in checks:
            try:
                result = check(reply)
            except CheckError as error:
                raise Rejected("check error", f"{check.name}: {error}") from error
            if not result.passed:
                found.append((f"check {check.name}", result.detail))
        return found

    def _kept(self, message: Message) -> Message:
        """The message as it is recorded: no thinking, ids of our own, arguments as mappings."""
        kept: Message = {"role": "assistant", "content": (message["content"] or "").strip()}
        calls = Reply([message]).calls
        if calls:
            place = len(self.messages)
            kept["tool_calls"] = [
                {
                    "id": f"call_{place}_{number}",
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for number, call in enumerate(calls)
            ]
        return kept

    async def _result(self, function: dict[str, Any]) -> str:
        """What the tool returns, by the teacher in the tool's place."""
        tool = next(tool for tool in self._persona.tools if tool["function"]["name"] == function["name"])
        task = _TOOL.format(
            definition=json.dumps(tool["function"], ensure_ascii=False),
            world=self._world or "nothing in particular",
            earlier=json.dumps(self._earlier, ensure_ascii=False),
        )
        call = json.dumps(function, ensure_ascii=False)
        answer = await self._ask([{"role": "system", "content": task}, {"role": "user", "content": call}], ())
        result = _unfenced(answer["content"] or "")
        if not result or len(result) > LONGEST_RESULT:
            raise Rejected("tool result", f"{function['name']} returned {len(result)} characters")
        self._earlier.append({"call": function, "result": result})
        return result


def _on_the_wire(message: Message) -> Message:
    """The message as OpenAI's interface takes it: arguments as JSON text."""
    if "tool_calls" not in message:
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


_THOUGHT = re.compile(r"\A\s*+(?:<think>)?(?:(?!</?think>).)*</think>\s*", re.DOTALL | re.IGNORECASE)
_TAG = re.compile(r"</?think>", re.IGNORECASE)


def spoken(text: str) -> str:
    """A text without the thinking before it, which a server without a reasoning parser leaves there.

    Many templates write `<think>` themselves, so the tag that opens may be missing.

    Raises:
        Rejected: Thinking without end, or in the middle.
    """
    rest = _THOUGHT.sub("", text, count=1)
    if _TAG.search(rest):
        raise Rejected("thinking", f"it cannot be told where it ends: {rest[:200]!r}")
    return rest


_FENCE = re.compile(r"\A```[^\n`]*\n(.*?)\n?```\Z", re.DOTALL)


def _unfenced(text: str) -> str:
    stripped = text.strip()
    found = _FENCE.match(stripped)
    return found[1].strip() if found else stripped


def record(identity: str, category: str, persona: Persona, messages: list[Message]) -> Conversation:
    """The conversation as a record."""
    made: dict[str, Any] = {"id": identity, "category": category, "messages": messages}
    if persona.tools:
        made["tools"] = persona.tools
    return cast("Conversation", made)
