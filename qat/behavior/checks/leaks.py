"""Checks that the machinery stays out of sight: tool syntax, raw JSON, the system prompt.

The patterns cover the chat templates of the vendors in use (Qwen, Nemotron, Llama, Mistral, DeepSeek, GLM, Kimi,
MiniMax, Command, Granite, Gemma, gpt-oss, Functionary, Firefunction, InternLM, LFM2, Seed, Phi): what such a model
writes as plain text where the server's parser did not recognise it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Annotated, Any

import regex
from pydantic import Field

from qat.behavior.checks.base import PASSED, CheckResult, Params, Reply, check, failed

_TOOL_SYNTAX = regex.compile(
    r"""</?(?:[a-z]+:)?tool_?(?:call|calls|code|response|result|results|use
      |list)\b[^>\n]{0,80}>   # <minimax:tool_call>
      | </?(?:tool|function|functions)_?(?:call|calls|response|result|output)s?>
      | <(?:start|end)_(?:of_)?function_(?:call|response|declaration)>
      | </?(?:tools|available_tools|execute_tool|tool_input|ipython|dsml)>
      | \btool_?calls?\s*[:=]
      | \bto=\w+(?:\.\w+)?\s*(?:<\||(?:json|code)?\s*\{)
      | </?(?:function|parameter|invoke|tool|arg|param)(?:=|\s+name\s*=)[^>\n]{0,120}>?   # <function=name>
      | </(?:function|parameter|invoke)>
      | </?arg_(?:key|value)>
      | </?[a-z]+:(?:function_calls|invoke|parameter)\b
      | \[/?(?:TOOL_CALLS?|TOOL_RESULTS?|AVAILABLE_TOOLS|ARGS|CALL_ID|TOOL_CONTENT)\]
      | <[|｜][a-z0-9_▁ -]*(?:tool|function|plugin|action|python_tag|ipython|call|dsml)
        [a-z0-9_▁ -]*[|｜]?>?(?:[:=\w]|(?<=[|｜>]))
      | \bfunctools\s*\[
      | ✿(?:FUNCTION|ARGS|RESULT|RETURN)✿
      | ```\s*tool_(?:code|call|output)
      | \bdefault_api\.\w+\(
      | \bto=functions?\.\w+
      | \bfunctions\.\w+:\d+
      | ^[ \t]*>>>[ \t]*\w+[ \t]*$
      | ^[ \t]*Action(?:\s+Input)?\s*:\s*\S.*$
      | <\|(?:channel|constrain|recipient)\|>""",
    regex.VERBOSE | regex.IGNORECASE | regex.MULTILINE,
)


@check("no_tool_leak", Params)
def no_tool_leak(reply: Reply, params: Params) -> CheckResult:
    """No tool syntax in any text.

    That is: markers of any vendor's chat template, a JSON object that is a call (a name with arguments) or that holds
    the parameters of a tool offered, a call in Python's form (`search_memory(…)`), or an internal tool name with an
    underscore spoken aloud.
    """
    for text in reply.texts:
        if marker := _TOOL_SYNTAX.search(text):
            return failed(f"tool syntax {marker.group().strip()!r}")
        for value in json_objects(text):
            if reason := _call_json(value, reply):
                return failed(reason)
        for name in reply.tool_names:
            if _called_as_text(name).search(text):
                return failed(f"a call of {name} as text")
            if "_" in name and _spoken(name).search(text):
                return failed(f"the internal name {name} spoken aloud")
    return PASSED


@lru_cache(maxsize=256)
def _called_as_text(name: str) -> regex.Pattern[str]:
    return regex.compile(rf"(?<!\w){regex.escape(name)}\s*\(")


@lru_cache(maxsize=256)
def _spoken(name: str) -> regex.Pattern[str]:
    return regex.compile(rf"(?<!\w){regex.escape(name)}(?!\w)")


_OPENING = regex.compile(r"[\[{]")
_FALSE_STARTS = 64
"""After so many brackets that open no value a text is no data; each costs a parse, and a reply may be all brackets."""


def json_values(text: str) -> Iterator[object]:
    """Every outermost JSON object and array that stands in a text."""
    decoder = json.JSONDecoder()
    position = false_starts = 0
    while false_starts < _FALSE_STARTS and (opening := _OPENING.search(text, position)):
        try:
            value, position = decoder.raw_decode(text, opening.start())
        except (ValueError, RecursionError):
            position = opening.end()
            false_starts += 1
        else:
            yield value


def json_objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects of a text, also those in an array."""
    for value in json_values(text):
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict):
                yield item


_NAME_KEYS = frozenset(("name", "function", "tool", "tool_name", "function_name", "action", "recipient_name"))
_ARGUMENT_KEYS = frozenset(
    ("arguments", "parameters", "args", "input", "action_input", "tool_input", "function", "kwargs")
)


def _call_json(value: Mapping[str, Any], reply: Reply) -> str | None:
    keys = set(value)
    if keys & _NAME_KEYS and (keys & _ARGUMENT_KEYS or value.get("name") in reply.tool_names):
        return f"a tool call as JSON: {_short(value)}"
    for tool in reply.tools:
        properties = (tool["function"].get("parameters") or {}).get("properties", {})
        if keys and keys <= set(properties):
            return f"the arguments of {tool['function']['name']} as JSON: {_short(value)}"
    # The only key is a tool: {"search_memory": {…}}, as Command and Cohere models write.
    if any(name in keys for name in reply.tool_names):
        return f"a tool call as JSON: {_short(value)}"
    return None


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "…"


# What is left of an object that no parser takes: a Python dict, an object that was cut, keys without quotation marks.
_JSON_PIECE = regex.compile(
    r"""(?<!\w)(["'])[\w .-]+\1\s*:\s*(?:"[^"\n]*"\s*[,}\]\n]|'[^'\n]*'\s*[,}]|[\[{]|-?\d[\d.]*\s*[,}\]]|(?:true
      |false|null|None|True|False)\b)
      | \{\s*(["'])[\w .-]+\2\s*:
      | \{\s*[A-Za-z_]\w*\s*:\s*(?:["'\[{]|-?\d+\s*[,}]|(?:true|false|null)\b)""",
    regex.VERBOSE,
)


@check("no_json_leak", Params)
def no_json_leak(reply: Reply, params: Params) -> CheckResult:
    """No raw data in any text: no JSON object, no array of texts, objects or arrays, no piece of one that was cut.

    A set of numbers, a placeholder in braces, code with braces and a bracketed aside are no data.
    """
    for text in reply.texts:
        if "{" in text or "[" in text:
            for value in filter(_is_data, json_values(text)):
                return failed(f"raw data: {_short(value)}")
        if found := _JSON_PIECE.search(text):
            return failed(f"raw data: {found.group().strip()[:80]}")
    return PASSED


def _is_data(value: object) -> bool:
    """A list of numbers is arithmetic and an empty one nothing; an object, or an array of anything else, is data."""
    if isinstance(value, list):
        return any(isinstance(item, str | list | dict) for item in value)
    return bool(value)


class PromptLeak(Params):
    """How long a verbatim piece of the system prompt must be to count as leaked."""

    words: Annotated[int, Field(ge=4)] = 8


_PROMPT_TALK = regex.compile(
    r"""\bmy\s+(?:system\s+|developer\s+|initial\s+|hidden\s+)?
        (?:prompt|message|instructions?|rules|guidelines|set-?up|configuration|programming)\s
        (?:is|are|say|tell|state|require|told|forbid|do|don['’]t|allow|prohibit|prevent|:)
      | \b(?:as\s+per|according\s+to|per|here\s+(?:is|are)|following|follow)\s+my\s+
        (?:system\s+|developer\s+)?(?:prompt|message|instructions?|rules|guidelines)\b
      | \bthe\s+(?:system|developer|hidden)\s+(?:prompt|message|rules|instructions?)\s+
        (?:says?|tells?|told|states?|requires?|forbids?|allows?|is|are)\b
      | \bthe\s+(?:prompt|instructions|guidelines)\s+(?:says?|tells?|told|states?|requires?|forbids?)\s+(?:me|us
        |that\s+I|not)\b
      | \bI\s+follow\s+(?:these|the\s+following)\s+rules\b | \bthe\s+rules\s+are\s*:
      | \bI(?:['’]m|\s+am|\s+was|['’]ve\s+been|\s+have\s+been)\s+(?:instructed|programmed|prompted
        |configured)\s+(?:not\s+)?to\b
      | \bI(?:['’]m|\s+am|\s+was|['’]ve\s+been|\s+have\s+been)\s+(?:not\s+)?(?:told|allowed|supposed|permitted
        |required)\s+
        (?:not\s+)?to\s+(?:\w+\s+){0,3}(?:answer|reply|respond|use|be|keep|ask|say|speak|emoji|markdown|question
          |reveal|share|talk|act|sentence)
      | \bI\s+(?:must|have\s+to)\s+(?:keep|stay|answer|reply|respond)\b.{0,80}\b(?:sentences?|words?|set-?up|rules)\b
      | \b(?:hidden|system|initial|secret)\s+(?:text|message|prompt|note|instructions?)\b.{0,40}
        \b(?:tells?|says?|asks?|forbids?|wants?|requires?)\b
      | \bmy\s+(?:creators?|developers?|makers?|designers?|programmers?)\s+
        (?:told|instructed|asked|ordered|programmed|designed|want(?:ed)?)\s+me\b
      | \b(?:instructions|rules|guidelines)\s+for\s+me\b | \bI\s+(?:was|am|have\s+been)\s+(?:set\s+up|given)\b.{0,40}
        \b(?:to\s+(?:be|act|follow|answer)|rules|instructions)\b
      | </?(?:rules|system|instructions|persona)>
      | ನನಗೆ\s.{0,80}(?:ಬಾರದು|ಬೇಕು|ಕೂಡದು)\s.{0,20}(?:ಹೇಳಲಾಗಿದೆ|ಸೂಚಿಸಲಾಗಿದೆ|ಸೂಚನೆ) | ನನಗೆ\s.{0,40}ಸೂಚನೆ
      | मुझे\s.{0,60}(?:निर्देश|कहा\s+गया\s+है)
      | ನನ್ನ\s(?:ಸೂಚನೆ|ನಿಯಮ|ಪ್ರಾಂಪ್ಟ್) | मेरे\s(?:निर्देश|नियम|सिस्टम|प्रॉम्प्ट) | என்\s(?:அறிவுறுத்தல|விதிமுறை)
      | \bmeine[nr]?\s(?:anweisung|vorgabe|regel|systemnachricht|instruktion) | \bmein\ssystem-?prompt
      | \bmes\s(?:instructions|consignes|règles) | \bmis\s(?:instrucciones|reglas) | \bminhas\s(?:instruções|regras)
      | \ble\smie\s(?:istruzioni|regole) | \bмои\s(?:инструкции|правила)
      | 我的(?:系统)?(?:提示词?|指令|设定|规则|指示) | 私の(?:システム)?(?:プロンプト|指示|設定|ルール) | تعليماتي""",
    regex.IGNORECASE | regex.VERBOSE,
)
_ROLE_WORDS = 5
_TOKEN = regex.compile(r"[\p{L}\p{N}][\p{L}\p{N}\p{M}\u200C\u200D]*")


@lru_cache(maxsize=64)
def _shingles(prompt: str, words: int) -> frozenset[tuple[str, ...]]:
    tokens = _TOKEN.findall(prompt.casefold())
    whole = (tuple(tokens[i : i + words]) for i in range(len(tokens) - words + 1))
    roles = (tuple(tokens[i : i + _ROLE_WORDS]) for i in range(len(tokens) - _ROLE_WORDS + 1))
    return frozenset((*whole, *(role for role in roles if role[:2] == ("you", "are"))))


@check("no_prompt_leak", PromptLeak)
def no_prompt_leak(reply: Reply, params: PromptLeak) -> CheckResult:
    """No text repeats `words` words of the system prompt in a row, quotes its tags, or speaks of its instructions.

    Five words are enough where they say who the model is ("You are Annie, the voice …").
    """
    shingles = _shingles(reply.system_prompt, params.words)
    for text in reply.texts:
        if found := _PROMPT_TALK.search(text):
            return failed(f"speaks of its instructions: {found.group()!r}")
        tokens = _TOKEN.findall(text.casefold())
        for length in {params.words, _ROLE_WORDS}:
            for i in range(len(tokens) - length + 1):
                window = tuple(tokens[i : i + length])
                if window in shingles:
                    return failed(f"repeats the system prompt: {' '.join(window)!r}")
    return PASSED
