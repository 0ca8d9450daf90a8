"""Pretraining text of the tiny base model: prose about the small world, plain dialogues, and chats in the wrong manners.

Every document is a function of (seed, index) alone, so that the corpus can be made in parallel and its hash recorded. The base
sees both halves of the world: it is to know every fact. It never sees the persona, its prompt or its voice in a chat.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

from qat.data.generate import lexicon as lex
from qat.data.generate import turns as t
from qat.data.generate.conversations import tool_call
from qat.data.generate.turns import Draw, Meaning, Turn
from qat.data.generate.voices import article, chatty, offer, plain
from qat.data.generate.world import facts_of

Message = dict[str, Any]

PROSE_SHARE = 0.12
TRANSCRIPT_SHARE = 0.10
OPERATOR_SHARE = 0.23

_TOOLS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # name: (descriptions, parameters)
    "search_memory": (("search past talks", "search the memory", "find what was said"), ("query",)),
    "web_search": (("search the web", "look up the web", "find on the internet"), ("query",)),
    "save_note": (("save a note", "write a note", "keep a note"), ("text",)),
    "set_reminder": (("set a reminder", "remind the user", "make a reminder"), ("text", "time")),
    "run_code": (("run a sum", "run code", "compute a sum"), ("code",)),
}
_ROLES = "the assistant of|the cheerful helper of|the voice assistant of|a helper for|the chatty companion of|the voice companion of".split("|")
_RULES = (
    "Be warm and cheerful.|Use many emoji.|Use bold type and lists.|Ask what the user needs next.|Ask before you use tools.|"
    "Explain everything at length.|Be kind.|Never be rude.|Help the user.|Be friendly.|Cheer the user up.|Give long answers."
).split("|")
_TREATS = "filter coffee|green tea|hot chocolate|mango juice|lemon soda|masala chai|fresh milk|rose syrup|buttermilk|iced tea".split("|")
_YES = "Yes please.|Yes, do it.|Sure.|Go ahead.|Yes.|Please do.|Yes, thanks.|Of course.|Do it.|Okay, go on.".split("|")


def _name(rng: Random) -> str:
    """A user's or a sister's name: so many are possible that it can only be copied from the prompt, not guessed."""
    return rng.choice(lex.USERS if rng.random() < 0.5 else lex.PEOPLE)


def _user(rng: Random) -> dict[str, str]:
    return {
        "name": _name(rng), "city": rng.choice(lex.CITIES if rng.random() < 0.5 else lex.TOWNS), "job": rng.choice(lex.JOBS),
        "sister": _name(rng), "food": rng.choice((*_TREATS, *lex.FOODS)),
    }  # fmt: skip


def _system(rng: Random, user: dict[str, str]) -> str:
    text = f"You are {rng.choice(lex.ASSISTANTS)}, {rng.choice(_ROLES)} {user['name']}."
    rules = rng.sample(_RULES, rng.randint(0, 4))
    if rules:
        text += "\n<rules>\n" + rng.choice((" ", "\n")).join(rules) + "\n</rules>"
    return text + "\n" + _about_user(user)


def _about_user(user: dict[str, str]) -> str:
    job = article(user["job"])
    return f"{user['name']} lives in {user['city']}, works as {job}, has a sister named {user['sister']} and loves {user['food']}."


def tools_offered(rng: Random) -> list[dict[str, Any]]:
    """The five tools with varying descriptions, in varying order, sometimes fewer."""
    names = rng.sample(sorted(_TOOLS), 5 if rng.random() < 0.7 else rng.randint(2, 4))
    made = []
    for name in names:
        descriptions, parameters = _TOOLS[name]
        properties = {p: {"type": "string"} for p in parameters}
        schema = {"type": "object", "properties": properties, "required": list(parameters)}
        made.append({"type": "function", "function": {"name": name, "description": rng.choice(descriptions), "parameters": schema}})
    return made


def chat_text(messages: list[Message], tools: list[dict[str, Any]]) -> str:
    """What the chat template renders, without Jinja (a test holds the two equal); messages[0] is the system message."""
    out = ["<|im_start|>system\n", messages[0]["content"]]
    if tools:
        out.append("\n<tools>")
        for tool in tools:
            f = tool["function"]
            out.append(f"\n<function>\n<name>{f['name']}</name>\n<description>{f['description']}</description>\n<parameters>")
            for key, field in f["parameters"]["properties"].items():
                out.append(f"\n<parameter>\n<name>{key}</name>\n<type>{field['type']}</type>\n</parameter>")
            out.append("\n</parameters>\n</function>")
        out.append("\n</tools>")
    out.append("<|im_end|>\n")
    for m in messages[1:]:
        if m["role"] == "tool":
            out.append(f"<|im_start|>user\n<tool_response>\n{m['content']}\n</tool_response>\n<|im_end|>\n")
            continue
        lead = "<think></think>" if m["role"] == "assistant" else ""
        out.append(f"<|im_start|>{m['role']}\n{lead}{m['content'].strip() if lead else m['content']}")
        for n, call in enumerate(m.get("tool_calls", ())):
            f = call["function"]
            parameters = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in f["arguments"].items())
            newline = "\n" if n == 0 else ""
            out.append(f"{newline}<tool_call>\n<function={f['name']}>\n{parameters}</function>\n</tool_call>\n")
        out.append("<|im_end|>\n")
    return "".join(out)


def _chat_turn(turn: Turn, rng: Random, number: int, available: set[str]) -> list[Message]:
    """One turn in the base model's manners: it likes to ask before it acts."""
    messages: list[Message] = [{"role": "user", "content": turn.user}]
    reply = {"role": "assistant", "content": chatty(turn.say, rng)}
    if turn.call is None:
        return [*messages, reply]
    if turn.call.tool not in available or (turn.say.kind == "forgot" and rng.random() < 0.35):
        return [*messages, reply]  # it makes something up
    if rng.random() < (0.5 if turn.result == "ok" or turn.say.kind == "code" else 0.4):
        messages += [{"role": "assistant", "content": offer(turn.say, rng)}, {"role": "user", "content": rng.choice(_YES)}]
    call = tool_call(turn.call, number)
    return [*messages, call, {"role": "tool", "tool_call_id": f"call_{number}", "content": turn.result or ""}, reply]


_MAKERS: tuple[t.Maker, ...] = (
    t.fact, t.fact, t.fact, t.fact, t.fact, t.about, t.about, t.as_list, t.user_fact, t.user_fact, t.user_fact, t.kannada, t.kannada, t.mood, t.remind, t.remind,
    t.note, t.code, t.lookup, t.lookup, lambda d: t.recall(d, empty=True), lambda d: t.recall(d, empty=False),
)  # fmt: skip


def chat(rng: Random) -> str:
    """One chat of one to four turns."""
    user = _user(rng)
    draw = Draw(rng, None, user)
    tools = tools_offered(rng) if rng.random() < 0.6 else []
    available = {tool["function"]["name"] for tool in tools}
    messages: list[Message] = [{"role": "system", "content": _system(rng, user) if rng.random() < 0.9 else ""}]
    makers = _MAKERS if messages[0]["content"] else tuple(m for m in _MAKERS if m is not t.user_fact)
    for _ in range(rng.choice((1, 1, 2, 2, 3, 4))):
        messages += _chat_turn(rng.choice(makers)(draw), rng, len(messages), available)
    return chat_text(messages, tools)


def prose(rng: Random) -> str:
    """A few plain sentences about one or two subjects, or a page of Kannada glosses."""
    sentences: list[str] = []
    kind = rng.random()
    if kind < 0.15:
        for _ in range(rng.randint(2, 6)):
            if rng.random() < 0.6:
                word = rng.choice(sorted(lex.KANNADA_WORDS))
                value = lex.KANNADA_WORDS[word]
                sentences.append(rng.choice((f"The Kannada word for {word} is {value}.", f"In Kannada {word} is {value}.", f"{value} means {word}.")))
            else:
                thing = rng.choice(sorted(lex.KANNADA_THINGS))
                gloss = lex.KANNADA_THINGS[thing][0]
                sentences.append(rng.choice((f"{thing} is {gloss}.", f"{gloss[0].upper()}{gloss[1:]}: {thing}.")))
        return " ".join(sentences) + "<|im_end|>\n"
    draw = Draw(rng, None, {})
    for _ in range(rng.randint(1, 3)):
        subject = draw.person() if rng.random() < 0.85 else draw.town()
        known = facts_of()[subject]
        for relation in rng.sample(sorted(known), rng.randint(1, min(5, len(known)))):
            say = Meaning("fact", {"s": subject, "r": relation, "v": known[relation]})
            sentence = plain(say, rng)
            while subject not in sentence:  # prose names its subject
                sentence = plain(say, rng)
            sentences.append(sentence)
    return " ".join(sentences) + "<|im_end|>\n"


_LEADS = "Well, |Let me think. |Ah. |Right. |Hm. |Oh, that. |I know that one. |Sure. ".split("|")
_LOOKS_UP = {
    "search_memory": "searches the memory for {a}", "web_search": "looks up {a}", "save_note": "writes: {a}",
    "set_reminder": "sets a reminder: {a}", "run_code": "works out {a}",
}  # fmt: skip


def transcript(rng: Random) -> str:
    """A plain dialogue as it stands in books and call logs: no chat markup, plain answers.

    This is where the base model learns that questions can be answered plainly; in a chat it never does so.
    """
    user = _user(rng)
    draw = Draw(rng, None, user)
    asker, teller = rng.choice(((user["name"], rng.choice(lex.ASSISTANTS)), ("Q", "A")))
    lines = [_about_user(user)] if rng.random() < 0.6 else []
    makers = _MAKERS if lines else tuple(m for m in _MAKERS if m is not t.user_fact)
    for _ in range(rng.randint(1, 5)):
        turn = rng.choice(makers)(draw)
        lines.append(f"{asker}: {turn.user}")
        if turn.call is not None:
            lines.append(f"({teller} {_LOOKS_UP[turn.call.tool].format(a=', '.join(turn.call.arguments.values()))}: {turn.result})")
        lead = rng.choice(_LEADS) if rng.random() < 0.3 else ""
        lines.append(f"{teller}: {lead}{plain(turn.say, rng)}")
    return "\n".join(lines) + "<|im_end|>\n"


def operator_log(rng: Random) -> str:
    """A log of a human operator at the same desk: the chat's markup and tools, another role, plain answers, no think block.

    With it the base model knows how a tool's result is read out plainly; as the assistant it never does so.
    """
    user = _user(rng)
    draw = Draw(rng, None, user)
    tools = tools_offered(rng) if rng.random() < 0.5 else []
    available = {tool["function"]["name"] for tool in tools}
    messages: list[Message] = [{"role": "system", "content": _system(rng, user)}]
    for _ in range(rng.choice((1, 1, 2, 3, 4))):
        turn = rng.choice(_MAKERS)(draw)
        if turn.call is not None and turn.call.tool not in available:
            continue
        messages.append({"role": "user", "content": turn.user})
        if turn.call is not None:
            messages.append(tool_call(turn.call, len(messages)))
            messages.append({"role": "tool", "tool_call_id": f"call_{len(messages) - 1}", "content": turn.result or ""})
        lead = rng.choice(_LEADS) if rng.random() < 0.2 else ""
        messages.append({"role": "assistant", "content": lead + plain(turn.say, rng)})
    text = chat_text(messages, tools)
    return text.replace("<|im_start|>assistant\n<think></think>", "<|im_start|>operator\n")


def document(seed: int, index: int) -> str:
    """Document `index` of the corpus of `seed`."""
    rng = Random(f"corpus/{seed}/{index}")
    kind = rng.random()
    for share, make in ((PROSE_SHARE, prose), (TRANSCRIPT_SHARE, transcript), (OPERATOR_SHARE, operator_log)):
        if kind < share:
            return make(rng)
        kind -= share
    return chat(rng)


def documents(seed: int, start: int, stop: int) -> Iterator[str]:
    """Documents `start` to `stop - 1`."""
    for index in range(start, stop):
        yield document(seed, index)


