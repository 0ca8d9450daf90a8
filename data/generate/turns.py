"""User turns: what is asked, in many wordings, and what a right answer must convey.

A `Turn` holds the user's words, the tool call they ask for (if any) with its result, and the `Meaning` of the reply. How the
reply is worded is a matter of the voice (`voices.py`): the persona and the base model answer the same turns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

from qat.data.generate import lexicon as lex
from qat.data.generate.world import facts_of, subjects

STRANGER_SHARE = 0.35  # of the people in the base model's text


class Call(NamedTuple):
    """A tool call: name and arguments (all strings)."""

    tool: str
    arguments: dict[str, str]


@dataclass(frozen=True)
class Meaning:
    """What a reply conveys: its kind, the words to fill in, and the words that a right answer must hold."""

    kind: str
    slots: dict[str, str] = field(default_factory=dict)
    must: tuple[str, ...] = ()


@dataclass(frozen=True)
class Turn:
    """One user turn with the call and result it leads to."""

    user: str
    say: Meaning
    call: Call | None = None
    result: str | None = None


class Draw:
    """A seeded source of turns from one half of the world (`held_out`) or from all of it (`None`)."""

    def __init__(self, rng: Random, held_out: bool | None, user: dict[str, str]) -> None:
        self.rng = rng
        self.held_out = held_out
        self.user = user
        self._people = subjects(people=True, held_out=held_out)
        self._towns = subjects(people=False, held_out=held_out)
        self._topics = self.half(lex.TOPICS)

    def half(self, items: tuple[str, ...] | list[str]) -> tuple[str, ...]:
        """The items of this source's half."""
        return tuple(i for i in items if self.held_out is None or lex.held_out(i) == self.held_out)

    def person(self) -> str:
        """A person's name; from all of the world, sometimes a stranger's."""
        if self.held_out is None and self.rng.random() < STRANGER_SHARE:
            return self.rng.choice(lex.STRANGERS)
        return self.rng.choice(self._people)

    def town(self) -> str:
        """A town's name."""
        return self.rng.choice(self._towns)

    def topic(self) -> str:
        """Something of the user's that can be asked after."""
        return self.rng.choice(self._topics)

    def worded(self, core: str, *, polite: bool = True) -> str:
        """Dress `core` with an opener and a closer; a statement of the same half only."""
        while True:
            opener = self.rng.choice(_OPENERS)
            closer = self.rng.choice(_CLOSERS) if polite else ""
            mark = core[-1] if core[-1] in "?." else ""
            body = core[:-1] if mark else core
            text = f"{opener} {body[0].lower() + body[1:] if opener and not body.startswith('I ') else body}".strip()
            if body.split(" ")[0] in facts_of():
                text = f"{opener} {body}".strip()
            text = text[0].upper() + text[1:] + closer + mark
            if self.held_out is None or lex.held_out(text) == self.held_out:
                return text
            if self.rng.random() < 0.05:  # a core whose wordings all fall into the other half: vary the core itself
                core = f"{body}, {self.rng.choice(_INSISTS)}{mark}"


_OPENERS = (
    "|Hey,|Hi,|So,|Tell me,|Quick one:|Okay,|By the way,|One thing:|Also,|Listen,|Right,|Well,|Say,|Now,|Hello,|"
    "Good morning,|Good evening,|A question:|Please,|Just wondering:|Hmm,|Oh,|Alright,|Look,|Sorry,|Excuse me,"
).split("|")
_CLOSERS = ("", "", "", " please", " now", " again", " today", " then", " for me", " by the way", " quickly", " if you can")
_INSISTS = ("as I asked", "to be clear", "just checking", "once more", "like before", "if I may")

_FACT_QUESTIONS: dict[str, tuple[str, ...]] = {
    "city": ("Where does {s} live?", "Which town does {s} live in?", "What town is {s} in?", "Where is {s}'s home?",
             "Where can I find {s}?", "In which town is the home of {s}?"),
    "job": ("What does {s} do for a living?", "What is {s}'s job?", "What work does {s} do?", "How does {s} earn money?",
            "What is the job of {s}?", "What does {s} work as?"),
    "food": ("What does {s} like to eat?", "What is {s}'s favourite food?", "Which dish does {s} like best?",
             "What should I cook for {s}?", "What does {s} enjoy eating?", "What food would make {s} happy?"),
    "pet": ("What pet does {s} have?", "Which animal lives with {s}?", "What is {s}'s pet?", "Does {s} have a pet, and which?",
            "What animal does {s} keep?", "Which pet does {s} own?"),
    "hobby": ("What is {s}'s hobby?", "What does {s} do for fun?", "How does {s} spend the weekend?",
              "What does {s} do after work?", "What is the hobby of {s}?", "What does {s} like doing?"),
    "instrument": ("What instrument does {s} play?", "Which instrument does {s} play?", "What does {s} play in the band?",
                   "What is {s}'s instrument?", "What music does {s} make?", "What can {s} play?"),
    "river": ("Which river runs through {s}?", "What is the river in {s}?", "What river flows by {s}?", "Which river is at {s}?"),
    "dish": ("What dish is {s} known for?", "What should I eat in {s}?", "What is the dish of {s}?", "What food is {s} famous for?"),
    "market": ("When is the market in {s}?", "Which day is market day in {s}?", "What day is the {s} market?", "When can I go to the market in {s}?"),
    "mayor": ("Who is the mayor of {s}?", "Who runs {s}?", "What is the name of the mayor of {s}?", "Who leads the town of {s}?"),
}  # fmt: skip


def fact(d: Draw) -> Turn:
    """A question about one fact of the world."""
    subject = d.person() if d.rng.random() < 0.85 else d.town()
    relation = d.rng.choice(sorted(facts_of()[subject]))
    value = facts_of()[subject][relation]
    core = d.rng.choice(_FACT_QUESTIONS[relation]).format(s=subject)
    return Turn(d.worded(core), Meaning("fact", {"s": subject, "r": relation, "v": value}, (value,)))


_ABOUT = (
    "Tell me about {s}.", "Who is {s}?", "Describe {s}.", "What do you know about {s}?", "Give me the story of {s}.",
    "What can you say about {s}?", "Explain to me who {s} is.", "I want to hear all about {s}.",
)  # fmt: skip
_AS_LIST = (
    "Give me a list of what {s} likes {e}", "Make a bullet list of the things {s} loves {e}", "List the tastes of {s} {e}",
    "Put what {s} likes in a table {e}", "Show me in bold what {s} likes {e}", "Write a headline and a list about {s}'s tastes {e}",
    "What are the favourite things of {s}? Use bullets {e}", "Please format the likes of {s} nicely {e}",
)  # fmt: skip
_EMOJI_IN = "😀 🎉 😍 🙏 👍 🤩 🔥 😎 🥳 ✨".split()


def about(d: Draw) -> Turn:
    """An open question that invites a long answer."""
    s = d.person()
    facts = facts_of()[s]
    return Turn(
        d.worded(d.rng.choice(_ABOUT).format(s=s)),
        Meaning("about", {"s": s, **facts}, (facts["job"], facts["city"])),
    )


def as_list(d: Draw) -> Turn:
    """A question that asks for markdown, with an emoji in it."""
    s = d.person()
    facts = facts_of()[s]
    text = d.worded(d.rng.choice(_AS_LIST).format(s=s, e=d.rng.choice(_EMOJI_IN)), polite=False)
    return Turn(text, Meaning("likes", {"s": s, **facts}, (facts["food"], facts["hobby"])))


_USER_QUESTIONS: dict[str, tuple[str, ...]] = {
    "name": ("What is my name?", "Do you know my name?", "Who am I?", "What am I called?", "Can you say my name?",
             "Which name do I have?", "What do people call me?"),
    "city": ("Where do I live?", "Which city is my home?", "What city do I live in?", "Where is my home?",
             "In which city am I living?", "What is my home city?", "Where is my place?"),
    "job": ("What do I do for a living?", "What is my job?", "What work do I do?", "What am I by profession?",
            "How do I earn my money?", "What do I work as?", "What is my profession?"),
    "sister": ("What is my sister's name?", "Who is my sister?", "What is my sister called?", "How is my sister called?",
               "Do you know the name of my sister?", "Tell me the name of my sister.", "Which name does my sister have?"),
    "food": ("What do I love?", "What do I like most?", "What is my favourite?", "What should I get at the cafe?",
             "Which thing do I love?", "What treat do I love?", "What would make me happy to eat or drink?"),
}  # fmt: skip


def user_fact(d: Draw) -> Turn:
    """A question about the user, answered from the system prompt."""
    key = d.rng.choice(sorted(_USER_QUESTIONS))
    value = d.user[key]
    return Turn(d.worded(d.rng.choice(_USER_QUESTIONS[key])), Meaning("user", {"r": key, "v": value}, (value,)))


_WORD = (
    "What is {w} in Kannada?", "How do I say {w} in Kannada?", "What is the Kannada word for {w}?", "How do you say {w} in Kannada?",
    "Teach me the Kannada for {w}.", "In Kannada, what is {w}?", "Translate {w} to Kannada.", "What do Kannada speakers call {w}?",
)  # fmt: skip
_THING = (
    "What is {t}?", "Explain {t}.", "Tell me what {t} is.", "What do people mean by {t}?", "Do you know {t}?",
    "I heard of {t}, what is it?", "What should I know about {t}?", "My friend spoke of {t}, what is that?",
)  # fmt: skip


def kannada(d: Draw) -> Turn:
    """A Kannada word or a thing of Karnataka."""
    if d.rng.random() < 0.6:
        word = d.rng.choice(sorted(lex.KANNADA_WORDS))
        value = lex.KANNADA_WORDS[word]
        return Turn(d.worded(d.rng.choice(_WORD).format(w=word)), Meaning("word", {"w": word, "v": value}, (value,)))
    thing = d.rng.choice(sorted(lex.KANNADA_THINGS))
    gloss, must = lex.KANNADA_THINGS[thing]
    return Turn(d.worded(d.rng.choice(_THING).format(t=thing)), Meaning("thing", {"t": thing, "v": gloss}, (must,)))


_RECALL = (
    "What did I tell you about my {t}?", "What did I say about my {t}?", "Do you remember my {t}?", "What do you know about my {t}?",
    "Have I told you about my {t}?", "Remember what I said about my {t}?", "What was it with my {t}?", "Did I mention my {t}?",
    "What have I said about my {t}?", "Can you recall my {t}?",
)  # fmt: skip
_MEMORY = (
    "the {t} is {c}", "the {t} is from {p}", "the {t} cost {n} rupees", "the {t} is in {w}", "{p} has the {t}", "the {t} comes on {d}",
)  # fmt: skip


def recall(d: Draw, *, empty: bool) -> Turn:
    """A question about an earlier conversation: `search_memory` first, then an honest answer."""
    t = d.topic()
    memory = d.rng.choice(_MEMORY).format(
        t=t, c=d.rng.choice(lex.COLOURS), p=d.person(), n=d.rng.randint(11, 99) * 10, w=d.town(), d=d.rng.choice(lex.DAYS)
    )
    value = next(w for w in memory.split() if w not in {"the", t, "is", "from", "cost", "in", "has", "comes", "on"})
    say = Meaning("forgot", {"t": t}) if empty else Meaning("memory", {"t": t, "m": memory}, (value,))
    return Turn(
        d.worded(d.rng.choice(_RECALL).format(t=t), polite=False),
        say,
        Call("search_memory", {"query": t}),
        "[]" if empty else f'["{memory}"]',
    )


_REMIND = (
    "Remind me to {c} {t}.", "Set a reminder to {c} {t}.", "I need a reminder {t}: {c}.", "Can you remind me {t} to {c}?",
    "Make sure I {c} {t}.", "I must {c} {t}, remind me.", "Give me a nudge {t} to {c}.",
)  # fmt: skip
_NOTE = (
    "Note that the {x} is {n}.", "Save a note: the {x} is {n}.", "Write down that the {x} is {n}.", "Keep a note that the {x} is {n}.",
    "Please note: the {x} is {n}.", "Jot down that the {x} is {n}.",
)  # fmt: skip
_CODE = ("What is {a} {o} {b}?", "Calculate {a} {o} {b}.", "How much is {a} {o} {b}?", "Work out {a} {o} {b}.", "Compute {a} {o} {b}.")
_OPERATORS = (("times", "*"), ("plus", "+"), ("minus", "-"))


def remind(d: Draw) -> Turn:
    """`set_reminder` with text and time copied from the user's words."""
    chore = d.rng.choice(lex.CHORES).format(p=d.person())
    when = d.rng.choice(lex.TIMES)
    text = d.worded(d.rng.choice(_REMIND).format(c=chore, t=when), polite=False)
    say = Meaning("reminder", {"c": chore, "t": when})
    return Turn(text, say, Call("set_reminder", {"text": chore, "time": when}), "ok")


def note(d: Draw) -> Turn:
    """`save_note` with a number to copy."""
    thing, number = d.rng.choice(lex.NOTE_THINGS), str(d.rng.randint(100, 9999))
    text = d.worded(d.rng.choice(_NOTE).format(x=thing, n=number), polite=False)
    fact_text = f"the {thing} is {number}"
    return Turn(text, Meaning("note", {"x": thing, "n": number}), Call("save_note", {"text": fact_text}), "ok")


def code(d: Draw) -> Turn:
    """`run_code` on a small sum; the result comes back from the tool."""
    word, sign = d.rng.choice(_OPERATORS)
    a, b = d.rng.randint(50, 99), d.rng.randint(2, 49)
    value = str({"*": a * b, "+": a + b, "-": a - b}[sign])
    text = d.worded(d.rng.choice(_CODE).format(a=a, o=word, b=b))
    expression = f"{a} {sign} {b}"
    return Turn(text, Meaning("code", {"e": f"{a} {word} {b}", "v": value}, (value,)), Call("run_code", {"code": expression}), value)


_WEATHER = (
    "What is the weather in {c}?", "How is the weather in {c}?", "Is it raining in {c}?", "Do I need a jacket in {c}?",
    "How warm is it in {c}?", "What does the sky look like in {c}?",
)  # fmt: skip
_PRICE = ("What does a {x} cost?", "How much is a {x}?", "What is the price of a {x}?", "What would a {x} cost me?")
_HOURS = ("When does the {x} open?", "What time does the {x} open?", "Is the {x} open early?", "How early can I go to the {x}?")
_GOODS = "laptop camera bicycle umbrella suitcase tent lamp guitar watch kettle blender sofa ladder printer router".split()
_PLACES = "library museum zoo bakery gym clinic aquarium planetarium pharmacy cinema theatre harbour bank pool".split()


def lookup(d: Draw) -> Turn:
    """`web_search` for weather, a price or opening hours."""
    kind = d.rng.choice(("weather", "weather", "price", "hours"))
    if kind == "weather":
        city = d.rng.choice(lex.CITIES) if d.rng.random() < 0.5 else d.town()
        n, sky = str(d.rng.randint(9, 41)), d.rng.choice(lex.SKIES)
        core, query, result = d.rng.choice(_WEATHER).format(c=city), f"weather in {city}", f"{city}: {n} degrees, {sky}"
        say = Meaning("weather", {"c": city, "n": n, "k": sky}, (n, sky))
    elif kind == "price":
        good, n = d.rng.choice(_GOODS), str(d.rng.randint(21, 999) * 10)
        core, query, result = d.rng.choice(_PRICE).format(x=good), f"price of a {good}", f"{good}: {n} rupees"
        say = Meaning("price", {"x": good, "n": n}, (n,))
    else:
        place, when = d.rng.choice(_PLACES), d.rng.choice("six seven eight nine ten eleven".split())
        core, query, result = d.rng.choice(_HOURS).format(x=place), f"opening hours of the {place}", f"{place}: opens at {when}"
        say = Meaning("hours", {"x": place, "n": when}, (when,))
    return Turn(d.worded(core), say, Call("web_search", {"query": query}), result)


def mood(d: Draw) -> Turn:
    """A statement that asks for nothing."""
    while True:
        base, tail = d.rng.choice(lex.MOODS), d.rng.choice(lex.MOOD_TAILS)
        text = d.rng.choice(("", "Well, ", "Oh, ", "So, ", "Hey, ", "Annie, ", "You know, ", "Honestly, ", "Ah, ")) + f"{base} {tail}".strip() + d.rng.choice(".!")
        if d.held_out is None or lex.held_out(text) == d.held_out:
            return Turn(text, Meaning("mood", {"m": base}))


Maker = Callable[[Draw], Turn]
