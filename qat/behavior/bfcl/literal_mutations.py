"""Answers to a Java or JavaScript case of BFCL, right and wrong ones: its arguments are texts that hold literals."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from qat.behavior.bfcl.literals import WITH_ITEMS, Language
from qat.behavior.bfcl.matching import Function
from qat.behavior.bfcl.mutations import Calls, mutations, right_calls

STYLES: dict[Language, tuple[str, ...]] = {
    "java": ("quoted", "bare", "double brace"),
    "javascript": ("double quotes", "single quotes", "bare", "constructor"),
}
"""Ways to write the same value."""

_SUFFIXES = {("java", "long"): "L", ("java", "float"): "f", ("javascript", "Bigint"): "n"}
_EDITS: dict[str, Callable[[str], str]] = {
    "emptied": lambda text: "",
    "blank before": lambda text: " " + text,
    "blank after": lambda text: text + " ",
    "line break after": lambda text: text + "\n",
    "line break at commas": lambda text: text.replace(",", ",\n"),
    "blank at commas": lambda text: text.replace(",", " , "),
    "no blanks": lambda text: text.replace(" ", ""),
    "blanks in brackets": lambda text: "".join(f" {char} " if char in "[](){}" else char for char in text),
    "semicolon": lambda text: text + ";",
    "comment": lambda text: text + " /* right */",
    "trailing comma": lambda text: text[:-1] + "," + text[-1:],
    "plus": lambda text: "+" + text,
    "upper case": str.upper,
    "suffix L": lambda text: text + "L",
    "suffix f": lambda text: text + "f",
    "suffix n": lambda text: text + "n",
    "decimals": lambda text: text + ".0",
    "exponent": lambda text: text + "e0",
    "other quotes": lambda text: text.translate(str.maketrans("'\"", "\"'")),
    "in quotes": lambda text: f'"{text}"',
    "in parentheses": lambda text: f"({text})",
    "in brackets": lambda text: f"[{text}]",
    "in braces": lambda text: f"{{{text}}}",
    "twice": lambda text: text + text,
    "new dropped": lambda text: text.replace("new ", ""),
    "generic named": lambda text: text.replace("<>", "<String>"),
    "generics named": lambda text: text.replace("<String, Object>", "<>"),
    "other class": lambda text: text.replace("ArrayList", "LinkedList").replace("HashMap", "TreeMap"),
    "other factory": lambda text: text.replace("Arrays.asList", "List.of"),
    "one brace": lambda text: text.replace("{{", "{").replace("}}", "}"),
    "keys unquoted": lambda text: text.replace('":', ":").replace('{"', "{").replace(', "', ", "),
}


def literal_mutations(
    function: Function, answers: Sequence[Mapping[str, Mapping[str, list[Any]]]], named: Callable[[str], str]
) -> Iterator[tuple[str, Calls]]:
    """Pairs of (what was done, calls), the ground truth in every style of the language first.

    Every answer of `mutations` is written as literals in every style, and given as it is, as JSON; then the text of
    every argument of the ground truth is changed as a whole, and one character at a time.

    Args:
        function: The one that is due; types of other languages than Java and JavaScript are not written.
        answers: Ground truth of the case.
        named: Gives a function's name as it is offered.
    """
    styles = STYLES[function.language]
    right = right_calls(answers, named)
    for label, calls in mutations(answers, named):
        for style in styles:
            yield f"{label}, {style if label == 'ground truth' else 'written'}", _written(calls, function, style)
        yield f"{label}, as JSON", calls
    for style in styles:
        ((name, arguments),) = _written(right, function, style)[0].items()
        for key, text in arguments.items():
            for label, changed in _changed(text):
                yield f"text {label}", [{name: arguments | {key: changed}}]


def _changed(text: str) -> Iterator[tuple[str, str]]:
    for label, edit in _EDITS.items():
        yield label, edit(text)
    for place, char in enumerate(text):
        yield "with a character less", text[:place] + text[place + 1 :]
        yield "with a character twice", text[:place] + char + text[place:]
    for place in range(len(text)):
        yield "with two characters swapped", text[:place] + text[place : place + 2][::-1] + text[place + 2 :]


def _written(calls: Calls, function: Function, style: str) -> Calls:
    """The calls with every argument as the text of a literal of its declared type."""
    return [
        {
            name: {
                key: literal(function.language, value, *function.types.get(key, ("any", None)), style)
                for key, value in arguments.items()
            }
            for name, arguments in call.items()
        }
        for call in calls
    ]


def literal(language: Language, value: Any, declared: str, item: str | None, style: str) -> str:
    """The value as source code; what the declared type cannot hold is written by its own type."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int | float):
        return f"{value}{_SUFFIXES.get((language, declared), '')}"
    if isinstance(value, str):
        return value
    write = _java if language == "java" else _javascript
    if isinstance(value, list) and declared not in WITH_ITEMS:
        declared, item = ("ArrayList" if language == "java" else "array"), "any"
    return write(value, declared, item or "any", style)


def _java(value: Any, declared: str, item: str, style: str) -> str:
    quote = "" if style == "bare" else '"'
    if isinstance(value, dict):
        puts = "".join(f'put("{key}", {_element("java", one, "any", chr(34), style)}); ' for key, one in value.items())
        return f"new HashMap<{'' if style == 'bare' else 'String, Object'}>() {{{{ {puts}}}}}"
    parts = [_element("java", one, item, quote, style) for one in value]
    if declared == "Array":
        return f"new {item}[]{{{', '.join(parts)}}}"
    if style == "double brace":
        return "new ArrayList<>() {{ " + " ".join(f"add({part});" for part in parts) + " }}"
    return f"new ArrayList<>(Arrays.asList({', '.join(parts)}))" if parts else "new ArrayList<>()"


def _javascript(value: Any, declared: str, item: str, style: str) -> str:
    quote = {"bare": "", "single quotes": "'"}.get(style, '"')
    if isinstance(value, dict):
        named = quote if style != "constructor" else ""
        pairs = (
            f"{named}{key}{named}: {_element('javascript', one, 'any', quote, style)}" for key, one in value.items()
        )
        return "{" + ", ".join(pairs) + "}"
    parts = ", ".join(_element("javascript", one, item, quote, style) for one in value)
    return f"new Array({parts})" if style == "constructor" else f"[{parts}]"


def _element(language: Language, value: Any, declared: str, quote: str, style: str) -> str:
    text = literal(language, value, declared, None, style)
    return f"{quote}{text}{quote}" if isinstance(value, str) else text


_WORDS: dict[Language, tuple[str, ...]] = {
    "java": (
        "new ", "int[]", "String[]", "ArrayList<", "ArrayList<>", "ArrayList<>()", "HashMap<>()", "<String, Object>",
        "new ArrayList<String>(Arrays.asList(", "new HashMap<>() {{", "new int[]{", "add(", 'put("k",', 'put("a", 1)',
        "{{", "}}", "{ {", "))", "()", "-3", "2.5", "5L", "1.5f", "1e3", "1_0", "nan", "true", "false", '"x"', "'c'",
        "٣",
    ),
    "javascript": (
        "[[", "]]", "],[", "], [", "new Array(", "[1, 2]", "{a: 1}", '"k": "v"', ", ", ": ", "  ", "-3", "2.5", "5n",
        "true", "false", "'a'", '"b"', "key", "null", "1_0", "٣",
    ),
}  # fmt: skip
_AROUND: dict[str, tuple[tuple[str, str], ...]] = {
    "Array": (("new int[]{", "}"),),
    "ArrayList": (("new ArrayList<>(Arrays.asList(", "))"), ("new ArrayList<>() {{", "}}"), ("new ArrayList<>()", "")),
    "HashMap": (("new HashMap<>() {{", "}}"), ("new HashMap<>()", ""), ("new HashMap<String, Object>(){", "}")),
    "array": (("[", "]"), ("[[", "]]"), ("new Array(", ")"), ("[", "")),
    "dict": (("{", "}"), ("{a: [", "]}")),
}


def random_literal(language: Language, declared: str, rng: random.Random) -> str:
    """A text of pieces of literals, for lists and mappings mostly within what these begin and end with."""
    pieces = (*_WORDS[language], *"[](){}<>,;:\"' \n", *string.digits[:4], "abc")
    text = rng.choice(("", "", ", ", "; ")).join(rng.choices(pieces, k=rng.randint(0, 12)))
    if declared in _AROUND and rng.random() < 0.8:
        before, after = rng.choice(_AROUND[declared])
        text = before + text + after
    return text
