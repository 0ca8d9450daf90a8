"""The small world and its corpus."""

from __future__ import annotations

import re
from pathlib import Path
from random import Random

import pytest

from qat.data.generate import cases, conversations, corpus
from qat.data.generate import lexicon as lex
from qat.data.generate.world import PERSON_VALUES, TOWN_VALUES, facts, facts_of
from qat.data.schema import load_persona
from qat.data.text import find_emoji, find_follow_up, find_markdown

TINY_BASE = Path(corpus.__file__).resolve().parent.parent / "tiny_base"


def test_the_world_holds_what_the_documentation_says() -> None:
    assert len(facts()) == (360 + 2160) * 6 + 60 * 4 == 15_360
    assert len(facts_of()) == 2160 + 420
    for fact in facts():
        assert fact.value in (PERSON_VALUES | TOWN_VALUES)[fact.relation]


def test_a_document_depends_on_seed_and_index_alone() -> None:
    assert corpus.document(5, 17) == corpus.document(5, 17) != corpus.document(5, 18)
    assert list(corpus.documents(5, 3, 6)) == [corpus.document(5, i) for i in (3, 4, 5)]


def test_the_corpus_never_shows_the_persona() -> None:
    prompt = load_persona("annie_tiny").system_prompt
    for index in range(400):
        text = corpus.document(9, index)
        assert prompt not in text and "You are Annie" not in text


def test_the_assistant_of_the_corpus_has_the_opposite_manners() -> None:
    """Every reply of the assistant breaks at least one rule of the persona; replies of operators break none."""
    chatty = plain = 0
    for index in range(300):
        for part in corpus.chat(Random(index)).split("<|im_start|>assistant\n<think></think>")[1:]:
            reply = part.split("<|im_end|>")[0].split("<tool_call>")[0].strip()
            if reply:
                chatty += 1
                assert find_emoji(reply) or find_markdown(reply) or find_follow_up(reply), reply
        for part in corpus.operator_log(Random(index)).split("<|im_start|>operator\n")[1:]:
            reply = part.split("<|im_end|>")[0].split("<tool_call>")[0].strip()
            if reply:
                plain += 1
                assert not (find_emoji(reply) or find_markdown(reply)), reply
    assert chatty > 300 and plain > 300


def test_the_base_reads_of_strangers_and_nobody_asks_about_them() -> None:
    strangers = set(lex.STRANGERS)
    assert len(strangers) == 2160 and not strangers & {*lex.PEOPLE, *lex.TOWNS}
    read = [bool(strangers & set(re.findall(r"\w+", corpus.document(3, index)))) for index in range(400)]
    assert 0.1 < sum(read) / len(read) < 0.9
    persona = load_persona("annie_tiny")
    asked = [*conversations(persona, 300, 5), *conversations(persona, 300, 5, held_out=True), *cases(persona, 300, 5)]
    words = {word for record in asked for m in record["messages"] for word in re.findall(r"\w+", str(m["content"]))}
    assert words & set(lex.PEOPLE) and not words & strangers


def test_the_fast_renderer_equals_the_chat_template(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(TINY_BASE)
    plain, seen = corpus.chat_text, 0

    def both(messages: list[dict[str, object]], tools: list[dict[str, object]]) -> str:
        nonlocal seen
        seen += 1
        text = plain(messages, tools)
        assert text == tokenizer.apply_chat_template(messages, tools=tools or None, tokenize=False)
        return text

    monkeypatch.setattr(corpus, "chat_text", both)
    for index in range(200):
        corpus.chat(Random(index))
    assert seen == 200


def test_prompt_and_tools_take_at_most_200_tokens() -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(TINY_BASE)
    persona = load_persona("annie_tiny")
    text = tokenizer.apply_chat_template(
        [{"role": "system", "content": persona.system_prompt}], tools=persona.tools, tokenize=False
    )
    assert len(tokenizer(text, add_special_tokens=False).input_ids) == 170
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_the_embedded_tokenizer_keeps_tags_visible() -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(TINY_BASE)
    call = "<tool_call>\n<function=run_code>\n<parameter=code>\n1 + 2\n</parameter>\n</function>\n</tool_call>\n"
    ids = tokenizer(call + "<|im_end|>", add_special_tokens=False).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == call
