"""A suite played by a model in this process: many conversations at once, greedily, judged by the suite's own checks.

Where there is no server for a model (fake-quantized weights on a GPU), this takes its place: the conversations run as
`qat.behavior.conversation` plays them, and whenever all that are still open wait for an answer, the model writes all
answers in a few batches. The chat template and the form of tool calls are those that a server would use.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from qat.behavior.answers import AnsweredBy
from qat.behavior.conversation import Talk, converse
from qat.behavior.records import Case
from qat.behavior.suite import Suite
from qat.train.objective import causal_lm

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
ROWS = 500
"""Conversations that the model continues together."""

_CALL = re.compile(r"<tool_call>\s*<function=([^>\n]+)>\s*(.*?)</function>\s*</tool_call>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


class Judged(NamedTuple):
    """One case, judged.

    Attributes:
        case: Its id.
        failed: Names of the checks that it failed, each once.
        replies: What the model wrote, to look at.
    """

    case: str
    failed: tuple[str, ...]
    replies: tuple[str, ...]


class _Waiting(NamedTuple):
    prompt: str
    answer: asyncio.Future[AnsweredBy]


class _Writer:
    """Collects the prompts of all open conversations and lets the model answer them together."""

    def __init__(self, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, max_tokens: int, count: int) -> None:
        self._model, self._tokenizer, self._max_tokens = causal_lm(model), tokenizer, max_tokens
        self._open = count
        self._waiting: list[_Waiting] = []

    async def ask(self, case: Case, messages: Sequence[Message]) -> AnsweredBy:
        """One answer; comes when every other open conversation waits too."""
        prompt = self._tokenizer.apply_chat_template(
            [_with_mappings(message) for message in messages],
            tools=case.tools or None,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        answer: asyncio.Future[AnsweredBy] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(str(prompt), answer))
        self._write()
        return await answer

    def close(self) -> None:
        """A conversation has ended."""
        self._open -= 1
        self._write()

    def _write(self) -> None:
        if not self._waiting or len(self._waiting) < self._open:
            return
        # Rows of like length pad least.
        ordered = sorted(self._waiting, key=lambda one: -len(one.prompt))
        self._waiting = []
        for start in range(0, len(ordered), ROWS):
            part = ordered[start : start + ROWS]
            for one, text in zip(part, self._continue([one.prompt for one in part]), strict=True):
                one.answer.set_result(AnsweredBy(read_reply(text), 0))

    @torch.no_grad()
    def _continue(self, prompts: list[str]) -> list[str]:
        self._tokenizer.padding_side = "left"
        encoded = self._tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        ids = encoded["input_ids"].to(self._model.device)
        written = self._model.generate(
            input_ids=ids,
            attention_mask=encoded["attention_mask"].to(self._model.device),
            max_new_tokens=self._max_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        texts: list[str] = self._tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
        return texts


def read_reply(text: str) -> Message:
    """A message with the tool calls that the text holds, in the form of Nemotron 3 (vLLM's `qwen3_coder` parser)."""
    calls = [
        {
            "id": f"call_{number}",
            "type": "function",
            "function": {"name": found[1].strip(), "arguments": json.dumps(dict(_PARAMETER.findall(found[2])))},
        }
        for number, found in enumerate(_CALL.finditer(text))
    ]
    if not calls:
        return {"role": "assistant", "content": text.strip()}
    return {"role": "assistant", "content": text.partition("<tool_call>")[0].strip(), "tool_calls": calls}


def _with_mappings(message: Message) -> Message:
    """The message with its calls' arguments as mappings, as chat templates take them."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call["function"]
        arguments = function["arguments"]
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
        calls.append({**call, "function": {**function, "arguments": parsed}})
    return {**message, "tool_calls": calls}


def play(
    suite: Suite, cases: Sequence[Case], model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> list[Judged]:
    """Play cases and judge them.

    Args:
        suite: Where the cases are from.
        cases: Which of them.
        model: In `eval` mode.
        tokenizer: With chat template.
        max_tokens: Longest reply.

    Returns:
        One for each case, in their order.
    """
    return asyncio.run(_play_all(suite, cases, _Writer(model, tokenizer, max_tokens, len(cases))))


async def _play_all(suite: Suite, cases: Sequence[Case], writer: _Writer) -> list[Judged]:
    async def one(case: Case) -> Judged:
        talk, script = Talk(), suite.script(case)
        await converse(case, script, lambda messages: writer.ask(case, messages), talk)
        writer.close()
        whole = talk.whole(case)
        failed = [check.name for check in script.checks if not check(whole).passed]
        failed += [
            check.name
            for turn, reply in zip(script.turns, talk.replies, strict=False)
            for check in turn.checks
            if not check(reply).passed
        ]
        failed += [fault.check for fault in talk.unreached(case)]
        replies = tuple(json.dumps(m["tool_calls"]) if "tool_calls" in m else m["content"] for m in talk.produced)
        return Judged(case.id, tuple(dict.fromkeys(failed)), replies)

    return list(await asyncio.gather(*map(one, cases)))


def manners_of(cases: Sequence[Case]) -> frozenset[str]:
    """The checks that every case carries: how the persona speaks, whatever it is asked."""
    return frozenset.intersection(*(frozenset(check.check for check in case.checks) for case in cases))
