"""A suite played by a model in this process, with a model that answers from a table."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from qat.behavior.suite import load_suite
from qat.matrix.play import manners_of, play, read_reply


class Letters:
    """A tokenizer of single characters, and the chat template reduced to roles and contents."""

    pad_token_id = 0
    padding_side = "right"

    def apply_chat_template(self, messages: list[dict[str, Any]], **_: Any) -> str:
        parts = []
        for message in messages:
            for call in message.get("tool_calls", ()):
                assert isinstance(call["function"]["arguments"], dict)
            parts.append(f"{message['role']}: {message['content']}")
        return "\n".join(parts)

    def __call__(self, texts: list[str], **_: Any) -> dict[str, torch.Tensor]:
        assert self.padding_side == "left"
        width = max(map(len, texts))
        rows = [[0] * (width - len(text)) + [ord(letter) for letter in text] for text in texts]
        ids = torch.tensor(rows)
        return {"input_ids": ids, "attention_mask": (ids != 0).long()}

    def batch_decode(self, rows: torch.Tensor, **_: Any) -> list[str]:
        return ["".join(chr(token) for token in row if token) for row in rows.tolist()]


class Table(torch.nn.Module):
    """Answers by the last line of the prompt; counts how often it is asked."""

    device = torch.device("cpu")

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer, self.batches = answer, []  # type: ignore[var-annotated]

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> torch.Tensor:
        prompts = Letters().batch_decode(input_ids)
        self.batches.append(len(prompts))
        texts = [self.answer(prompt.rsplit("\n", 1)[-1]) for prompt in prompts]
        width = max(map(len, texts))
        rows = torch.tensor([[ord(letter) for letter in text] + [0] * (width - len(text)) for text in texts])
        return torch.cat([input_ids, rows], dim=1)


def test_conversations_wait_for_each_other_and_tools_are_fed() -> None:
    suite = load_suite("annie_tiny_full")
    cases = [case for case in suite.cases if case.tool_results][:2] + [c for c in suite.cases if not c.tool_results][:3]

    def answer(line: str) -> str:
        if line.startswith("tool: "):
            return "Done."
        return "<tool_call>\n<function=set_reminder>\n<parameter=text>\nx\n</parameter>\n</function>\n</tool_call>\n"

    model = Table(answer)
    judged = play(suite, cases, model, Letters(), 96)  # type: ignore[arg-type]
    fed = sum("set_reminder" in case.tool_results for case in cases)
    assert model.batches == [5, *([fed] if fed else [])]
    assert [one.case for one in judged] == [case.id for case in cases]
    assert all(
        len(one.replies) == 1 + ("set_reminder" in case.tool_results) for one, case in zip(judged, cases, strict=True)
    )


def test_manners_and_content_are_told_apart() -> None:
    suite = load_suite("annie_tiny_full")
    cases = [case for case in suite.cases if case.category == "concise_voice"][:4]
    manners = manners_of(suite.cases)
    assert manners == {
        "not_empty", "no_emoji", "no_markdown", "max_sentences", "max_words", "no_follow_up_question", "no_tool_leak",
        "no_think_leak", "no_role_confusion", "no_prompt_leak",
    }  # fmt: skip
    polite = play(suite, cases, Table(lambda _: "It is so."), Letters(), 96)  # type: ignore[arg-type]
    assert all(set(one.failed) == {"mentions"} for one in polite)
    loud = play(suite, cases, Table(lambda _: "**Yes**! \U0001f389 What else?"), Letters(), 96)  # type: ignore[arg-type]
    assert all(manners & set(one.failed) == {"no_emoji", "no_markdown", "no_follow_up_question"} for one in loud)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("Plain. ", "Plain.", []),
        (
            "Wait.\n<tool_call>\n<function=run_code>\n<parameter=code>\n2 * 3\n</parameter>\n</function>\n"
            "</tool_call>\n",
            "Wait.",
            [("run_code", {"code": "2 * 3"})],
        ),
        (
            "<tool_call>\n<function=a>\n</function>\n</tool_call>\n<tool_call>\n<function=b>\n<parameter=x>\nl1\nl2\n"
            "</parameter>\n<parameter=y>\n\n</parameter>\n</function>\n</tool_call>",
            "",
            [("a", {}), ("b", {"x": "l1\nl2", "y": ""})],
        ),
        ("<tool_call>\n<function=broken", "<tool_call>\n<function=broken", []),
    ],
)
def test_calls_are_read_as_the_server_reads_them(text: str, content: str, calls: list[Any]) -> None:
    message = read_reply(text)
    found = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in message.get("tool_calls", [])]
    assert (message["content"], found) == (content, calls)
