"""Tokenizers and chat templates with one planted fault each; the tokenizers library says what a vocabulary is."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qat.export.doctor.checks_template import check_chat_template
from qat.export.doctor.checks_tokenizer import check_tokenizer, read_vocabulary, stop_ids
from qat.export.doctor.findings import Severity
from qat.export.doctor.folder import open_checkpoint
from tests.unit.doctor.one_check import Plant, codes, copy_texts, findings
from tests.unit.doctor.planting import TINY_BASE, edit_json

TEMPLATE = (TINY_BASE / "chat_template.jinja").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy_texts(tmp_path / "checkpoint")


def tokenizer(edit: Callable[[dict[str, Any]], Any]) -> Plant:
    return edit_json("tokenizer.json", edit)


def settings(**fields: Any) -> Plant:
    return edit_json("tokenizer_config.json", lambda content: content.update(fields))


def remove(name: str) -> Plant:
    return lambda folder: (folder / name).unlink()


def template(text: str) -> Plant:
    return lambda folder: (folder / "chat_template.jinja").write_text(text, encoding="utf-8")


def swap_two_tokens(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    one, other = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]


def add(token: str, number: int) -> Plant:
    entry = {"id": number, "content": token, "special": True}
    return tokenizer(lambda content: content["added_tokens"].append(entry))


ALONE: list[tuple[str, Plant]] = [
    ("tokenizer_missing", remove("tokenizer.json")),
    ("tokenizer_invalid", tokenizer(lambda content: content.update(model=1))),
    ("tokenizer_settings_missing", remove("tokenizer_config.json")),
    ("tokenizer_vocabulary", add("<new>", 3072)),
    ("added_token_clash", add("<second>", 2)),
    ("added_token_clash", add("<|im_end|>", 3000)),
    ("special_token_unknown", settings(pad_token="<nowhere>")),
    ("special_token_unknown", settings(extra_special_tokens=["<nowhere>"])),
    ("special_token_unknown", settings(unk_token={"content": "<nowhere>"})),
    ("special_token_mismatch", settings(eos_token="<s>")),
]


@pytest.mark.parametrize(("code", "plant"), ALONE)
def test_a_fault_of_the_tokenizer(folder: Path, code: str, plant: Plant) -> None:
    assert codes(check_tokenizer, folder) == set()
    plant(folder)
    assert code in codes(check_tokenizer, folder)
    assert len(codes(check_tokenizer, folder)) == 1 or code == "added_token_clash"


AGAINST: list[tuple[str, Severity, Plant]] = [
    ("tokenizer_missing", Severity.ERROR, remove("tokenizer.json")),
    ("tokenizer_differs", Severity.ERROR, tokenizer(swap_two_tokens)),
    ("tokenizer_differs", Severity.ERROR, tokenizer(lambda content: content.update(pre_tokenizer=None))),
    ("tokenizer_truncation", Severity.NOTE, tokenizer(lambda content: content.update(truncation={"max_length": 512}))),
    ("tokenizer_settings", Severity.WARNING, settings(add_bos_token=True)),
    ("tokenizer_settings", Severity.WARNING, settings(pad_token=None)),
    ("tokenizer_class", Severity.NOTE, settings(tokenizer_class="PreTrainedTokenizerFast")),
]


@pytest.mark.parametrize(("code", "severity", "plant"), AGAINST)
def test_a_difference_from_the_base(folder: Path, code: str, severity: Severity, plant: Plant) -> None:
    assert codes(check_tokenizer, folder, TINY_BASE) == set()
    plant(folder)
    [found] = findings(check_tokenizer, folder, TINY_BASE)
    assert (found.code, found.severity) == (code, severity)


def test_another_layout_of_the_same_file_is_no_difference(folder: Path) -> None:
    tokenizer(lambda content: None)(folder)
    assert (folder / "tokenizer.json").read_bytes() != (TINY_BASE / "tokenizer.json").read_bytes()
    assert codes(check_tokenizer, folder, TINY_BASE) == set()


def test_a_binary_form_is_compared_too(folder: Path, tmp_path: Path) -> None:
    base = shutil.copytree(folder, tmp_path / "base")
    (base / "tokenizer.model").write_bytes(b"\xff\x00one")
    assert codes(check_tokenizer, folder, base) == {"tokenizer_form_missing"}
    (folder / "tokenizer.model").write_bytes(b"\xff\x00two")
    assert codes(check_tokenizer, folder, base) == {"tokenizer_differs"}
    (folder / "tokenizer.model").write_bytes(b"\xff\x00one")
    assert codes(check_tokenizer, folder, base) == set()


def test_the_vocabulary_is_the_librarys() -> None:
    from tokenizers import Tokenizer

    library = Tokenizer.from_file(str(TINY_BASE / "tokenizer.json"))
    found = read_vocabulary(json.loads((TINY_BASE / "tokenizer.json").read_text(encoding="utf-8")))
    assert found is not None
    assert found.ids == library.get_vocab(with_added_tokens=True)
    decoder = library.get_added_tokens_decoder()
    assert dict(found.added) == {token.content: number for number, token in decoder.items()}
    assert found.special == {token.content for token in decoder.values() if token.special}


def test_unigram_vocabularies_number_their_tokens() -> None:
    found = read_vocabulary({"model": {"type": "Unigram", "vocab": [["<unk>", 0.0], ["a", -1.5]]}})
    assert found is not None and found.ids == {"<unk>": 0, "a": 1}


@pytest.mark.parametrize("strange", [None, 1, "x", [], {}, [[]], [{}], [{"content": {}}], {"vocab": [1, "ab", [[]]]}])
def test_any_value_in_any_field(folder: Path, strange: object) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        original = (folder / name).read_text(encoding="utf-8")
        content = json.loads(original)
        for field in (*content, "chat_template"):
            (folder / name).write_text(json.dumps(content | {field: strange}), encoding="utf-8")
            codes(check_tokenizer, folder, TINY_BASE)
        (folder / name).write_text(original, encoding="utf-8")


ENDLESS = "{% for i in range(10000) %}{% for j in range(10000) %}without end{% endfor %}{% endfor %}"
PLAIN_ONLY = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
)
TEMPLATES: list[tuple[str, Severity, Plant]] = [
    ("template_invalid", Severity.ERROR, template("{% for %}")),
    ("template_unsafe", Severity.ERROR, template("{{ messages.__class__.__mro__ }}" + TEMPLATE)),
    ("template_unsafe", Severity.ERROR, template(ENDLESS + TEMPLATE)),
    ("template_plain", Severity.WARNING, template("{{ messages[-1].content }}")),
    ("template_tools", Severity.NOTE, template(PLAIN_ONLY)),
    ("template_tools", Severity.WARNING, template(TEMPLATE.replace("f.arguments | items", "f.arguments.items"))),
    ("template_turn_end", Severity.ERROR, template(TEMPLATE.replace("<|im_end|>", "<|im_start|>"))),
    ("template_turn_end", Severity.ERROR, settings(eos_token="<s>")),
]


@pytest.mark.parametrize(("code", "severity", "plant"), TEMPLATES)
def test_a_fault_of_the_template(folder: Path, code: str, severity: Severity, plant: Plant) -> None:
    edit_json("generation_config.json", lambda content: content.update(eos_token_id=[0]))(folder)
    assert codes(check_chat_template, folder) == set()
    plant(folder)
    assert (code, severity) in [(found.code, found.severity) for found in findings(check_chat_template, folder)]


def test_the_template_and_the_base(folder: Path) -> None:
    assert codes(check_chat_template, folder, TINY_BASE) == set()
    template(TEMPLATE.removesuffix("\n"))(folder)
    assert codes(check_chat_template, folder, TINY_BASE) == set()
    template(TEMPLATE.replace("enable_thinking if", "false if"))(folder)
    [found] = findings(check_chat_template, folder, TINY_BASE)
    assert found.code == "template_differs"
    assert "1 lines more, 1 less" in found.problem and "enable_thinking" in found.problem
    (folder / "chat_template.jinja").unlink()
    assert codes(check_chat_template, folder, TINY_BASE) == {"template_missing"}
    assert codes(check_chat_template, folder) == set()


def test_two_templates(folder: Path) -> None:
    settings(chat_template=[{"name": "tools", "template": "x"}, {"name": "default", "template": TEMPLATE}])(folder)
    assert codes(check_chat_template, folder, TINY_BASE) == set()
    settings(chat_template=PLAIN_ONLY)(folder)
    assert codes(check_chat_template, folder, TINY_BASE) == {"template_twice"}
    settings(chat_template=TEMPLATE)(folder)
    (folder / "chat_template.jinja").unlink()
    assert codes(check_chat_template, folder, TINY_BASE) == set()


def test_servers_stop_where_vllm_does(folder: Path) -> None:
    """The tokenizer's token and the generation settings' ones; `config.json` only stands in for the latter."""
    vocabulary = read_vocabulary(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")))
    assert vocabulary is not None
    edit_json("config.json", lambda content: content.update(eos_token_id=5))(folder)
    edit_json("generation_config.json", lambda content: content.update(eos_token_id=[7, 8]))(folder)
    assert stop_ids(open_checkpoint(folder), vocabulary) == {2, 7, 8}
    (folder / "generation_config.json").unlink()
    assert stop_ids(open_checkpoint(folder), vocabulary) == {2, 5}


def test_a_real_tokenizer(real_data: Path, tmp_path: Path) -> None:
    source = real_data / "qwen3_tokenizer"
    names = [name for name in os.listdir(source) if (source / name).is_file() and "index" not in name]
    for name in names:
        shutil.copyfile(source / name, tmp_path / name)
    assert codes(check_tokenizer, tmp_path, tmp_path) == set()
    assert codes(check_chat_template, tmp_path, tmp_path) == set()
