"""Row lengths against the training's own rendering, and by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qat.errors import UserError
from qat.plan.rows import BYTES_PER_TOKEN, MESSAGE_TOKENS, estimate_rows
from qat.plan.shape import CARDS
from qat.recipe.load import load_recipe

TINY = CARDS.parents[1] / "data" / "tiny_base"


def test_rendered_rows_are_those_that_training_sees(tmp_path: Path) -> None:
    from qat.data.generate import conversations
    from qat.data.load import save_conversations
    from qat.data.schema import load_persona
    from qat.train.base import load_tokenizer
    from qat.train.batches import encode_file

    recipe = load_recipe("annie_tiny", ["data.count=30", "train.distill.prompts=null"])
    rows = estimate_rows(recipe, TINY)
    file = tmp_path / "all.jsonl"
    save_conversations(file, conversations(load_persona("annie_tiny"), 30, recipe.data.seed))  # type: ignore[arg-type]
    encoded = encode_file(file, load_tokenizer(recipe.base, TINY), recipe.data.max_length)
    assert sorted(len(sample.input_ids) for sample in encoded.samples) == sorted(
        row.tokens for row in (*rows.train, *rows.validation)
    )
    supervised = sum(label >= 0 for sample in encoded.samples for label in sample.labels)
    replies = sum(row.replies for row in (*rows.train, *rows.validation))
    assert replies == pytest.approx(supervised, rel=0.3)  # calls are counted as JSON, the template writes XML
    assert "rendered" in rows.how


def test_without_a_tokenizer_bytes_are_counted(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "x" * 36}, {"role": "assistant", "content": "y" * 18}]
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps({"messages": turns, "id": str(n)}) + "\n" for n in range(4)))
    recipe = load_recipe("annie_v4", [f"data.source={file}", "data.count=null", "data.max_length=4096"])
    rows = estimate_rows(recipe, None)
    from qat.data.schema import load_persona

    persona = load_persona("annie")
    prompt = sum(
        round(len(text.encode()) / BYTES_PER_TOKEN)
        for text in (persona.system_prompt, json.dumps(persona.tools, ensure_ascii=False))
    )
    assert {row.tokens for row in rows.train} == {prompt + 10 + 5 + 3 * MESSAGE_TOKENS}
    assert {row.replies for row in rows.train} == {5 + 1}
    assert len(rows.train) + len(rows.validation) == 4 and rows.held_out == rows.validation
    assert "3.6 bytes a token" in rows.how


def test_a_folder_of_conversations_in_another_form(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "x" * 36}, {"from": "gpt", "value": "y" * 18}]
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"conversations": turns}) + "\n")
    recipe = load_recipe("annie_v4", [f"data.source={tmp_path}", "data.count=null"])
    rows = estimate_rows(recipe, None)
    assert [row.replies for row in (*rows.train, *rows.validation)] == [5 + 1] * 2
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no conversation"):
        estimate_rows(recipe, None)


def test_rows_are_cut_at_the_recipes_length() -> None:
    rows = estimate_rows(load_recipe("annie_v4", ["data.max_length=100", "data.count=10"]), None)
    assert {row.tokens for row in rows.train} == {100}


def test_joined_prompts_make_fewer_and_longer_rows() -> None:
    recipe = load_recipe("annie_tiny", ["train.distill.prompts.count=50", "train.distill.prompts.joined=5"])
    rows = estimate_rows(recipe, None)
    assert len(rows.lessons) == 10
    assert min(row.replies for row in rows.lessons) > min(row.replies for row in rows.train)


def test_a_persona_outside_the_small_world_is_said_to_be_guessed() -> None:
    assert "does not know annie" in estimate_rows(load_recipe("annie_v4", ["data.count=10"]), None).how


@pytest.mark.parametrize(
    ("line", "words"), [("{", "malformed JSON"), ("7", "an object"), ('{"messages": [1]}', "not an object")]
)
def test_a_faulty_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text(f"\n{line}\n")
    recipe = load_recipe("annie_v4", [f"data.source={file}", "data.count=null"])
    with pytest.raises(UserError, match=words) as fault:
        estimate_rows(recipe, None)
    assert fault.value.where == f"{file}, line 2"
