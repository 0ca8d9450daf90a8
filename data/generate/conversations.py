"""Persona conversations and held-out cases, in ten categories, from the same turns.

A conversation is a plan of turns answered in the persona's voice. A case is a plan whose last turn is left to the
model: it carries the prefix, the tool results to feed and the checks that follow from the last turn's meaning. Training
draws from one half of the world and cases from the other (`lexicon.held_out`): they share no user turn, and ask for no
common person, town or topic.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from random import Random
from typing import Any

from qat.data.generate import turns as t
from qat.data.generate.turns import Call, Draw, Meaning, Turn
from qat.data.generate.voices import plain
from qat.data.schema import Persona
from qat.errors import UserError

Message = dict[str, Any]

CATEGORIES = (
    "topic_switch", "direct_action", "concise_voice", "honest_memory", "rajesh_context", "kannada_culture",
    "mixed_multiturn", "no_emoji_no_markdown", "tool_result_responses", "no_followup_questions",
)  # fmt: skip

_SWITCHES = (
    "Forget that. ",
    "Never mind. ",
    "Something else. ",
    "Another thing. ",
    "Leave it. ",
    "Enough of that. ",
    "Changing the topic. ",
    "",
)
_ACTIONS: tuple[t.Maker, ...] = (t.remind, t.remind, t.note, t.code)
_TALK: tuple[t.Maker, ...] = (t.fact, t.about, t.user_fact, t.kannada, t.mood)


def _maybe_empty(d: Draw) -> Turn:
    return t.recall(d, empty=d.rng.random() < 0.75)


def _switched(d: Draw, turn: Turn) -> Turn:
    return Turn(d.rng.choice(_SWITCHES) + turn.user, turn.say, turn.call, turn.result)


def _topic_switch(d: Draw) -> list[Turn]:
    first = d.rng.choice((t.fact, t.about, t.kannada))(d)
    while True:
        second = d.rng.choice((t.fact, t.fact, t.kannada, t.user_fact))(d)
        if second.say.slots.get("s") != first.say.slots.get("s") and second.say.must != first.say.must:
            return [first, _switched(d, second)]


def _mixed(d: Draw) -> list[Turn]:
    plan = [
        d.rng.choice(_TALK)(d),
        d.rng.choice((*_ACTIONS, t.lookup))(d),
        d.rng.choice((t.fact, t.user_fact, _maybe_empty))(d),
    ]
    if d.rng.random() < 0.5:
        d.rng.shuffle(plan)
    return plan


_PLANS: dict[str, Callable[[Draw], list[Turn]]] = {
    "topic_switch": _topic_switch,
    "direct_action": lambda d: [d.rng.choice(_ACTIONS)(d)],
    "concise_voice": lambda d: [d.rng.choice((t.about, t.about, t.fact))(d)],
    "honest_memory": lambda d: [_maybe_empty(d)],
    "rajesh_context": lambda d: [t.user_fact(d)],
    "kannada_culture": lambda d: [t.kannada(d)],
    "mixed_multiturn": _mixed,
    "no_emoji_no_markdown": lambda d: [t.as_list(d)],
    "tool_result_responses": lambda d: [d.rng.choice((t.lookup, t.lookup, t.code))(d)],
    "no_followup_questions": lambda d: [t.mood(d)],
}


def tool_call(call: Call, number: int) -> Message:
    """An assistant message with one tool call; arguments are a mapping."""
    function = {"name": call.tool, "arguments": dict(call.arguments)}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": f"call_{number}", "type": "function", "function": function}],
    }


def answered(turn: Turn, rng: Random, number: int) -> list[Message]:
    """The messages of one turn in the persona's voice: user, the call and its result if any, reply."""
    messages: list[Message] = [{"role": "user", "content": turn.user}]
    if turn.call is not None:
        messages.append(tool_call(turn.call, number))
        messages.append({"role": "tool", "tool_call_id": f"call_{number}", "content": turn.result or ""})
    messages.append({"role": "assistant", "content": plain(turn.say, rng)})
    return messages


def _draw(persona: Persona, seed: int, held_out: bool) -> Draw:
    needed = {"name", "city", "job", "sister", "food"}
    missing = sorted(needed - persona.facts.keys())
    if missing:
        raise UserError(
            "the generator needs facts about the user that this persona does not hold",
            where=f"persona {persona.name}: facts", value=missing,
            remedy="the grammars know the small world alone (annie_tiny): let a teacher write a file, "
            f"`qat data generate {persona.name}.jsonl --recipe RECIPE --teacher teacher.yaml` (docs/data.md), or bring "
            f"your own; then add --set data.source={persona.name}.jsonl --set data.count=null",
        )  # fmt: skip
    return Draw(Random(f"{persona.name}/{seed}/{held_out}"), held_out, {k: str(v) for k, v in persona.facts.items()})


def _plans(d: Draw, count: int) -> Iterable[tuple[str, list[Turn]]]:
    """`count` plans, categories in turn, no user turn twice."""
    seen: set[str] = set()
    for index in range(count):
        category = CATEGORIES[index % len(CATEGORIES)]
        for _ in range(400):
            plan = _PLANS[category](d)
            if all(turn.user not in seen for turn in plan):
                break
        else:
            raise UserError(
                f"the grammar of category {category!r} has no further distinct turns",
                value=count,
                remedy="ask for fewer",
            )
        seen.update(turn.user for turn in plan)
        yield category, plan


def conversations(
    persona: Persona, count: int, seed: int, *, held_out: bool = False, joined: int = 1
) -> list[dict[str, Any]]:
    """Conversations of one half of the small world, deterministic by seed; no user turn comes twice.

    Args:
        persona: Prompt, tools and the user's facts.
        count: Conversations.
        seed: Of the draw.
        held_out: From the half that cases are drawn from, instead of the training half.
        joined: So many follow each other under one system prompt in a record (the last one may hold fewer); the
            record bears the first one's category.

    Returns:
        Records of `Conversation`.
    """
    d = _draw(persona, seed, held_out)
    made: list[dict[str, Any]] = []
    messages: list[Message] = []
    for index, (category, plan) in enumerate(_plans(d, count)):
        if index % joined == 0:
            messages = [{"role": "system", "content": persona.system_prompt}]
            made.append(
                {"id": f"{category}-{index:05d}", "category": category, "messages": messages, "tools": persona.tools}
            )
        for turn in plan:
            messages += answered(turn, d.rng, len(messages))
    d.rng.shuffle(made)
    return made


_MANNERS: list[dict[str, Any]] = [
    {"check": "not_empty"}, {"check": "no_emoji"}, {"check": "no_markdown"}, {"check": "max_sentences", "n": 2},
    {"check": "max_words", "n": 25}, {"check": "no_follow_up_question"}, {"check": "no_tool_leak"},
    {"check": "no_think_leak"},
    {"check": "no_role_confusion"}, {"check": "no_prompt_leak"},
]  # fmt: skip
_FORGOT = ["do not remember", "don't remember", "nothing about", "no memory"]


def _says(say: Meaning) -> list[dict[str, Any]]:
    """Checks of what the reply must hold."""
    if say.kind == "forgot":
        return [{"check": "mentions", "any": _FORGOT}]
    if say.kind == "mood" or not say.must:
        return []
    return [{"check": "mentions", "all": list(say.must)}]


def _calls(turn: Turn) -> list[dict[str, Any]]:
    if turn.call is None:
        return [{"check": "no_call"}]
    arguments = {
        key: {"contains": value} if key in {"query", "text"} else {"equals": value, "ignore_case": True}
        for key, value in turn.call.arguments.items()
    }
    if turn.call.tool == "save_note":  # any wording that keeps the number
        arguments = {"text": {"contains": turn.say.slots["n"]}}
    if turn.call.tool == "web_search":
        arguments = {"query": {"contains": next(turn.say.slots[k] for k in ("c", "x") if k in turn.say.slots)}}
    return [{"check": "calls", "tool": turn.call.tool, "arguments": arguments}]


def _as_json(message: Message) -> Message:
    """The message with its calls' arguments as JSON text, as the server's interface takes them."""
    if "tool_calls" not in message:
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def cases(persona: Persona, count: int, seed: int) -> list[dict[str, Any]]:
    """Held-out cases: `count` case records, deterministic by seed, from the half that training never sees."""
    d = _draw(persona, seed, held_out=True)
    system = {"role": "system", "content": persona.system_prompt}
    made = []
    for index, (category, plan) in enumerate(_plans(d, count)):
        messages = [system]
        for turn in plan[:-1]:
            messages += answered(turn, d.rng, len(messages))
        last = plan[-1]
        messages.append({"role": "user", "content": last.user})
        case: dict[str, Any] = {"id": f"{category}-{index:04d}", "category": category}
        given = category == "tool_result_responses" and last.call is not None
        if last.call is not None and given:  # the call and its result are part of the prefix: only the reply is judged
            messages.append(tool_call(last.call, len(messages)))
            messages.append({"role": "tool", "tool_call_id": f"call_{len(messages) - 1}", "content": last.result or ""})
        elif last.call is not None:
            case["tool_results"] = {last.call.tool: last.result or ""}
        checks = [] if given else _calls(last)
        if category == "topic_switch" and "s" in plan[0].say.slots:
            checks.append({"check": "not_mentions", "any": [plan[0].say.slots["s"]]})
        case["checks"] = [*_MANNERS, *checks, *_says(last.say)]
        case["messages"] = [_as_json(message) for message in messages]
        made.append(case)
    return made
