"""Checks that the machinery stays out of sight: tool syntax, thinking, the system prompt, roles of the conversation.

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
    r"""</?(?:[a-z]+:)?tool_?(?:call|calls|code|response|result|results|use|list)\b[^>\n]{0,80}>   # <minimax:tool_call>
      | </?(?:tool|function|functions)_?(?:call|calls|response|result|output)s?>
      | <(?:start|end)_(?:of_)?function_(?:call|response|declaration)>
      | </?(?:tools|available_tools|ipython|dsml)>
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
      | ^\s*>>>\s*\w+\s*$
      | ^\s*Action(?:\s+Input)?\s*:\s*\S.*$
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


def json_objects(text: str) -> Iterator[dict[str, Any]]:
    """Every outermost JSON object that stands in a text."""
    decoder = json.JSONDecoder()
    position = text.find("{")
    while position >= 0:
        try:
            value, end = decoder.raw_decode(text, position)
        except ValueError:
            end = position + 1
        else:
            yield value
        position = text.find("{", end)


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


_THINK_MARKS = regex.compile(
    r"""</?(?:[a-z]+:)?(?:think|thinking|thought|thoughts|reasoning|reflection|scratchpad|analysis|inner_monologue)\b[^>\n]{0,40}>
      | \[/?(?:THINK|THINKING|REASONING)\]
      | ◁/?think▷
      | <\|/?(?:think|thinking|begin_of_thought|end_of_thought|inner_prefix|START_THINKING|END_THINKING)\|?>
      | <\|channel\|?>\s*(?:analysis|thought)
      | ^\s*(?:assistant)?(?:analysis|thought)\s*(?:\n|:)""",
    regex.VERBOSE | regex.IGNORECASE | regex.MULTILINE,
)
# Reasoning that lost its tags: it speaks of the user in the third person or of the reply as a task.
_THINK_ALOUD = regex.compile(
    r"""^\W*(?:(?:okay|ok|alright|hmm+|so|well|now|first)[,.]?\s+){0,2}
        (?: (?:the|this)\s+user\s+(?:is|was|has|wants|asks|asked|said|says|just|seems|might|mentioned|needs|didn)
          | (?:we|i)\s+(?:need|have|should|must)\s+(?:to\s+)?
            (?:respond|reply|answer|produce|figure|think|check\s+(?:the|if|whether)\s+(?:user|rules|tools?|system))
          | let(?:'s|\s+me|\s+us)\s+(?:think|reason|break\s+this|analy[sz]e|see\s+what\s+the\s+user)
          | (?:according\s+to|per|based\s+on)\s+(?:the|my)\s+(?:rules|instructions|system\s+prompt|guidelines)
        )\b""",
    regex.VERBOSE | regex.IGNORECASE,
)


@check("no_think_leak", Params)
def no_think_leak(reply: Reply, params: Params) -> CheckResult:
    """No thinking in any text: neither tags of any vendor nor untagged reasoning at the beginning."""
    for text in reply.texts:
        if found := _THINK_MARKS.search(text) or _THINK_ALOUD.search(text):
            return failed(f"thinking {found.group().strip()!r}")
    return PASSED


class PromptLeak(Params):
    """How long a verbatim piece of the system prompt must be to count as leaked."""

    words: Annotated[int, Field(ge=4)] = 8


_PROMPT_TALK = regex.compile(
    r"\b(?:my|the)\s+(?:system\s+prompt|instructions|prompt|hidden\s+rules|guidelines)\s+(?:is|are|say|says|tell|tells|state|states|require|told|forbids?)\b"
    r"|\bI\s+(?:was|am|have\s+been)\s+(?:instructed|told|programmed|prompted|configured)\s+(?:to|not\s+to)\b|</?(?:rules|system|instructions|persona)>",
    regex.IGNORECASE,
)
_TOKEN = regex.compile(r"[\p{L}\p{N}][\p{L}\p{N}\p{M}\u200C\u200D]*")


@lru_cache(maxsize=64)
def _shingles(prompt: str, words: int) -> frozenset[tuple[str, ...]]:
    tokens = _TOKEN.findall(prompt.casefold())
    return frozenset(tuple(tokens[i : i + words]) for i in range(len(tokens) - words + 1))


@check("no_prompt_leak", PromptLeak)
def no_prompt_leak(reply: Reply, params: PromptLeak) -> CheckResult:
    """No text repeats `words` words of the system prompt in a row, quotes its tags, or speaks of its instructions."""
    shingles = _shingles(reply.system_prompt, params.words)
    for text in reply.texts:
        if found := _PROMPT_TALK.search(text):
            return failed(f"speaks of its instructions: {found.group()!r}")
        tokens = _TOKEN.findall(text.casefold())
        for i in range(len(tokens) - params.words + 1):
            window = tuple(tokens[i : i + params.words])
            if window in shingles:
                return failed(f"repeats the system prompt: {' '.join(window)!r}")
    return PASSED


class RoleConfusion(Params):
    """Names of the user, as whom the model must not speak."""

    user: tuple[str, ...] = ()


_OTHERS = (
    r"chat\s?gpt|gpt-?[345o]\w*|claude|qwen\d*|tongyi|gemini|bard|llama(?:\s?\d)?|mistral|nemotron|deepseek|kimi|copilot|siri|alexa|grok|"
    r"google\s+assistant|phi-?\d"
)
_MAKERS = (
    r"openai|anthropic|alibaba(?:\s+cloud)?|google(?:\s+deepmind)?|meta(?:\s+ai)?|nvidia|mistral\s+ai|deepseek|microsoft|"
    r"moonshot(?:\s+ai)?|xai"
)
_CONFUSED = regex.compile(
    rf"""\b(?:i\s+am|i['’]m|my\s+name\s+is|this\s+is|call\s+me)\s+(?:actually\s+|really\s+|just\s+)?(?:{_OTHERS})\b
      | \bas\s+an?\s+(?:ai|artificial\s+intelligence|large\s+language\s+model|language\s+model|virtual\s+assistant)\b
      | \b(?:i\s+am|i['’]m)\s+(?:just\s+|only\s+)?an?\s+(?:large\s+)?
        (?:language\s+model|ai(?!\s+(?:companion|friend))|artificial\s+intelligence|chat\s?bot)\b
      | \b(?:i\s+was|i\s+am|i['’]m|model|assistant)\s+(?:\w+\s+)?
        (?:developed|created|made|trained|built)\s+by\s+(?:{_MAKERS})\b
      | <\|(?:im_start|im_end|start_header_id|end_header_id|eot_id|endoftext)\|>
      | <\|(?:user|assistant|system|end|start|message|return)\|>
      | <｜(?:User|Assistant|end▁of▁sentence|begin▁of▁sentence)｜>
      | <(?:start|end)_of_turn>|<extra_id_\d>|<SPECIAL_\d+>|</s>|\[/?INST\]|<</?SYS>>
      | ^\s*(?:\#+\s*)?(?:user|human|assistant|system|bot|ai)\s*:""",
    regex.VERBOSE | regex.IGNORECASE | regex.MULTILINE,
)


@lru_cache(maxsize=256)
def _as_user(names: tuple[str, ...]) -> regex.Pattern[str]:
    any_name = "|".join(map(regex.escape, names))
    return regex.compile(rf"\b(?:i\s+am|i['’]m|my\s+name\s+is)\s+(?:{any_name})\b", regex.IGNORECASE)


@check("no_role_confusion", RoleConfusion)
def no_role_confusion(reply: Reply, params: RoleConfusion) -> CheckResult:
    """The model speaks as the persona: not as another assistant or "an AI", not for the user, and without turn markers.

    "I'm Annie, not ChatGPT" and "your AI companion" are the persona's own words and pass.
    """
    for text in reply.texts:
        found = _CONFUSED.search(text) or (_as_user(params.user).search(text) if params.user else None)
        if found:
            return failed(f"speaks as another: {found.group().strip()!r}")
    return PASSED
