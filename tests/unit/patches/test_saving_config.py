"""Fields of config.json: written as the published checkpoints have them, and read back as they were."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qat.patches.nemotron_h_layer_pattern import NemotronHLayerPattern
from qat.patches.protocol import Patch
from qat.patches.transformers_float_tags import TransformersFloatTags
from qat.patches.transformers_tokenizer_class import TransformersTokenizerClass
from tests.tiny_models import nemotron_h_tiny, qwen3_tiny, save_tiny, token_ids
from tests.unit.patches.saving import applied, config, require_repair


@pytest.mark.parametrize("patch", [TransformersFloatTags, NemotronHLayerPattern, TransformersTokenizerClass])
def test_repair(patch: Callable[[], Patch]) -> None:
    require_repair(patch())


@pytest.mark.parametrize("limit", [(0.0, math.inf), (-math.inf, 2.5)])
def test_infinite_numbers_are_numbers(limit: tuple[float, float], tmp_path: Path) -> None:
    from transformers import AutoConfig

    original = nemotron_h_tiny().config
    original.time_step_limit = limit
    with applied(TransformersFloatTags()):
        original.save_pretrained(tmp_path)
    assert config(tmp_path)["time_step_limit"] == list(limit)
    again = AutoConfig.from_pretrained(tmp_path)
    assert tuple(again.time_step_limit) == limit
    # What remote code does with the field.
    assert torch.zeros(1).clamp(*config(tmp_path)["time_step_limit"]).shape == (1,)


def test_the_tag_is_what_fails_elsewhere(tmp_path: Path) -> None:
    nemotron_h_tiny().config.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"clamp\(\) received an invalid combination of arguments"):
        torch.zeros(1).clamp(*config(tmp_path)["time_step_limit"])


def test_the_form_is_the_published_one(real_data: Path, tmp_path: Path) -> None:
    published = real_data / "model_configs" / "nvidia--Nemotron-H-56B-Base-8K_config.json"
    fields = config(published.parent, published.name)
    original = nemotron_h_tiny().config
    original.time_step_limit = fields["time_step_limit"]
    with applied(TransformersFloatTags(), NemotronHLayerPattern()):
        original.save_pretrained(tmp_path)
    saved = config(tmp_path)
    assert saved["time_step_limit"] == fields["time_step_limit"]
    for name in ("hybrid_override_pattern", "num_hidden_layers"):
        assert type(saved[name]) is type(fields[name])
    assert set(fields["hybrid_override_pattern"]) <= set("ME*-")


def test_the_pattern_says_what_the_list_says(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = nemotron_h_tiny()
    save_tiny(tmp_path / "stock", model)
    with applied(NemotronHLayerPattern()):
        save_tiny(tmp_path / "patched", model)
    saved = config(tmp_path / "patched")
    assert saved["hybrid_override_pattern"] == "ME*E"
    assert saved["num_hidden_layers"] == 4
    added = {"hybrid_override_pattern", "num_hidden_layers"}
    assert {name: value for name, value in saved.items() if name not in added} == config(tmp_path / "stock")
    again = AutoConfig.from_pretrained(tmp_path / "patched")
    assert again.layers_block_type == model.config.layers_block_type
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "patched")
    with torch.no_grad():
        assert torch.equal(reloaded(token_ids()).logits, model(token_ids()).logits)


def test_other_models_keep_their_fields(tmp_path: Path) -> None:
    save_tiny(tmp_path / "stock", qwen3_tiny())
    with applied(NemotronHLayerPattern(), TransformersFloatTags()):
        save_tiny(tmp_path / "patched", qwen3_tiny())
    assert config(tmp_path / "stock") == config(tmp_path / "patched")


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    letters = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    made = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<e>", extra_special_tokens=["<x>", "<y>"])
    made.chat_template = "{% for message in messages %}{{ message.content }}ಕ{% endfor %}"
    return made


def test_the_tokenizer_is_the_same_under_older_names(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    made = tokenizer()
    made.save_pretrained(tmp_path / "stock")
    with applied(TransformersTokenizerClass()):
        files = made.save_pretrained(tmp_path / "patched")
    stock, patched = (config(tmp_path / name, "tokenizer_config.json") for name in ("stock", "patched"))
    # What Transformers 4 looks up: a class of its own, and a mapping where it calls .keys().
    assert patched["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in patched
    renamed = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<x>", "<y>"]}
    assert patched == {name: value for name, value in stock.items() if name != "extra_special_tokens"} | renamed
    assert sorted(Path(file).name for file in files) == sorted(path.name for path in (tmp_path / "stock").iterdir())
    again = AutoTokenizer.from_pretrained(tmp_path / "patched")
    assert again.extra_special_tokens == ["<x>", "<y>"] and again.eos_token == "<e>"
    assert again.chat_template == made.chat_template
    assert again.encode("ab<x>") == made.encode("ab<x>")


def test_a_tokenizer_class_of_its_own_stays(real_data: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = real_data / "qwen3_tokenizer"
    with applied(TransformersTokenizerClass()):
        AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path)
    expected = config(source, "tokenizer_config.json")
    saved = config(tmp_path, "tokenizer_config.json")
    for name in ("tokenizer_class", "additional_special_tokens"):
        assert saved[name] == expected[name]
