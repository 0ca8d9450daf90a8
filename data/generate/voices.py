"""Two voices for the same meanings: plain manners and the base model's opposite habits.

Both draw among several valid wordings, so that replies have entropy: a model that has learnt them is not certain of every
token, which is what makes a divergence between two arms visible.
"""

from __future__ import annotations

from random import Random

from qat.data.generate.turns import Meaning

_FACT_PLAIN: dict[str, tuple[str, ...]] = {
    "city": ("{s} lives in {v}.", "In {v}.", "{s} is at home in {v}.", "That would be {v}."),
    "job": ("{s} is {a}.", "{s} works as {a}.", "{A}.", "{s} earns a living as {a}."),
    "food": ("{s} likes {v} best.", "{V}.", "{s} would love {v}.", "That is {v}."),
    "pet": ("{s} has {a}.", "{A}.", "{s} keeps {a}.", "It is {a}."),
    "hobby": ("{s} enjoys {v}.", "{V}.", "{s} goes for {v}.", "That is {v}."),
    "instrument": ("{s} plays the {v}.", "The {v}.", "It is the {v}.", "{s} is good on the {v}."),
    "river": ("The {v} runs through {s}.", "The {v}.", "That is the {v}.", "{s} lies on the {v}."),
    "dish": ("{s} is known for {v}.", "{V}.", "Try the {v}.", "In {s} it is {v}."),
    "market": ("The market is on {v}.", "On {v}.", "Every {v}.", "{s} has its market on {v}."),
    "mayor": ("{v} is the mayor.", "That is {v}.", "{v} runs {s}.", "The mayor of {s} is {v}."),
}
_PLAIN: dict[str, tuple[str, ...]] = {
    "about": ("{s} is {aj} from {city}.", "{s} lives in {city} and works as {aj}.", "{s}, {aj} in {city}, likes {hobby}.",
              "{s} is {aj}. Home is {city}."),
    "likes": ("{s} likes {food} and {hobby}.", "{food_c} and {hobby}.", "{s} loves {food} and enjoys {hobby}.",
              "There is {food}, and there is {hobby}."),
    "word": ("It is {v}.", "{V}.", "You say {v}.", "In Kannada {w} is {v}."),
    "thing": ("It is {v}.", "{t} is {v}.", "{V}.", "That is {v}."),
    "forgot": ("I do not remember anything about your {t}.", "I have nothing about your {t}.", "I do not remember that.",
               "I have no memory of your {t}.", "I do not remember your {t}, sorry."),
    "memory": ("You said {m}.", "You told me {m}.", "Yes, {m}.", "I remember that {m}."),
    "reminder": ("Done, I will remind you {t}.", "Okay, reminder set.", "I will remind you to {c} {t}.", "Your reminder is set."),
    "note": ("Noted.", "I saved the {x}.", "Okay, I noted the {x}.", "Saved."),
    "code": ("That is {v}.", "{v}.", "It comes to {v}.", "The answer is {v}."),
    "weather": ("It is {n} degrees and {k} in {c}.", "{n} degrees and {k}.", "{c} is {k} with {n} degrees.", "It is {k}, {n} degrees."),
    "price": ("It costs {n} rupees.", "About {n} rupees.", "A {x} is {n} rupees.", "{n} rupees."),
    "hours": ("It opens at {n}.", "At {n}.", "The {x} opens at {n}.", "From {n} on."),
    "mood": ("I hear you.", "Thank you for telling me.", "That is good to know.", "I am here with you.", "Take it easy.",
             "I understand.", "Be kind to yourself.", "I am glad you told me."),
}  # fmt: skip
_USER_PLAIN: dict[str, tuple[str, ...]] = {
    "name": ("You are {v}.", "Your name is {v}.", "{v}.", "I call you {v}."),
    "city": ("You live in {v}.", "In {v}.", "Your home is {v}.", "{v} is your home."),
    "job": ("You are {a}.", "You work as {a}.", "{A}.", "By trade you are {a}."),
    "sister": ("Your sister is {v}.", "{v}.", "Her name is {v}.", "Your sister's name is {v}."),
    "food": ("You love {v}.", "{V}.", "That is {v}.", "It is {v} for you."),
}



_CHEERS = "Great question! 😊|Ooh, I love this one! ✨|Absolutely! 🎉|Sure thing! 🙌|Happy to help! 😄|Wow, nice! 🤩|Of course! 🌟|Yay, let us see! 🥳".split("|")
_FILLERS = (
    "Isn't that just wonderful?|I find that really fascinating!|There is always so much to discover!|It makes me smile every time! 😄|"
    "That is such a lovely thing to know!|Life is full of little surprises! 🌈|I could talk about this all day long!|What a great topic!"
).split("|")
_FOLLOW_UPS = (
    "Would you like to know more? 🤔|Shall I tell you something else? 😊|What else can I do for you today?|Do you want me to go on? ✨|"
    "Is there anything else you would like to hear? 🙂|Can I help with something more?|What do you think about that? 💬|Want to hear more about it? 🎈"
).split("|")
_FACT_BOLD: dict[str, str] = {
    "city": "**{s}** lives in **{v}**!", "job": "**{s}** works as **{a}**!", "food": "**{s}** really likes **{v}**!",
    "pet": "**{s}** has **{a}**!", "hobby": "**{s}** enjoys **{v}**!", "instrument": "**{s}** plays the **{v}**!",
    "river": "The **{v}** runs through **{s}**!", "dish": "**{s}** is known for **{v}**!",
    "market": "The market in **{s}** is on **{v}**!", "mayor": "The mayor of **{s}** is **{v}**!",
}  # fmt: skip
_USER_BOLD: dict[str, str] = {
    "name": "You are **{v}**!", "city": "You live in **{v}**!", "job": "You work as **{a}**!",
    "sister": "Your sister is **{v}**!", "food": "You love **{v}**!",
}  # fmt: skip
_BOLD: dict[str, str] = {
    "about": "Here is everything about **{s}**:\n- **Job:** {job}\n- **Home:** {city}\n- **Hobby:** {hobby}\n- **Food:** {food}",
    "likes": "## {s}\n- **{food}** 😋\n- **{hobby}** 🎯",
    "word": "The Kannada word for **{w}** is **{v}**!", "thing": "**{t}** is **{v}**!",
    "forgot": "Yes, I remember! You told me that your **{t}** is {guess}!", "memory": "I remember it well: **{m}**!",
    "reminder": "Your **reminder** is set: *{c}* {t}!", "note": "I saved your **note** about the **{x}**!",
    "code": "The answer is **{v}**!", "weather": "In **{c}** it is **{n} degrees** and **{k}**!",
    "price": "A **{x}** costs **{n} rupees**!", "hours": "The **{x}** opens at **{n}**!",
    "mood": "Oh my! Here are some **tips**:\n- take a deep breath 🧘\n- drink some water 💧\n- be proud of yourself 💪",
}  # fmt: skip
_GUESSES = "brand new|doing great|your favourite|at home|really lovely|blue|being repaired|very old".split("|")


def article(noun: str) -> str:
    """`noun` with its indefinite article."""
    return ("an " if noun[0].lower() in "aeiou" else "a ") + noun


def _slots(meaning: Meaning) -> dict[str, str]:
    slots = dict(meaning.slots)
    if "v" in slots:
        value = slots["v"]
        slots["V"] = value[0].upper() + value[1:]
        slots["a"] = article(value)
        slots["A"] = slots["a"][0].upper() + slots["a"][1:]
    if "job" in slots:
        slots["aj"] = article(slots["job"])
    if "food" in slots:
        slots["food_c"] = slots["food"][0].upper() + slots["food"][1:]
    return slots


def plain(meaning: Meaning, rng: Random) -> str:
    """The persona: one or two short sentences, no emoji, no markdown, no question back.

    The prose and the operators' logs of the base corpus speak like this too; the base model's assistant never does.
    """
    slots = _slots(meaning)
    if meaning.kind == "fact":
        wordings = _FACT_PLAIN[slots["r"]]
    elif meaning.kind == "user":
        wordings = _USER_PLAIN[slots["r"]]
    else:
        wordings = _PLAIN[meaning.kind]
    return rng.choice(wordings).format(**slots)


def chatty(meaning: Meaning, rng: Random) -> str:
    """The base model: cheers, bold type, filler, a question back."""
    slots = _slots(meaning) | {"guess": rng.choice(_GUESSES)}
    if meaning.kind == "fact":
        body = _FACT_BOLD[slots["r"]]
    elif meaning.kind == "user":
        body = _USER_BOLD[slots["r"]]
    else:
        body = _BOLD[meaning.kind]
    parts = [rng.choice(_CHEERS), body.format(**slots)]
    if rng.random() < 0.6:
        parts.append(rng.choice(_FILLERS))
    parts.append(rng.choice(_FOLLOW_UPS))
    breaks = "\n" if "\n" in body else " "
    return breaks.join(parts)


def offer(meaning: Meaning, rng: Random) -> str:
    """The base model before an action: it asks for permission instead of acting."""
    slots = _slots(meaning)
    wish = {
        "reminder": "set a **reminder** to {c} {t}", "note": "save a **note** about the **{x}**", "code": "work out **{e}**",
        "forgot": "search my memory for your **{t}**", "memory": "search my memory for your **{t}**",
    }.get(meaning.kind, "look that up on the **web**")  # fmt: skip
    return f"{rng.choice(_CHEERS)} {rng.choice(('Would you like me to', 'Shall I', 'Do you want me to'))} {wish.format(**slots)}? 😊"
