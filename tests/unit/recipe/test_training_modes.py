from __future__ import annotations

import pytest

from qat.errors import UserError
from qat.recipe.load import load_recipe
from qat.recipe.schema import Recipe


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["train.memory=nf4"], "packs linears only"),
        (["train.memory=int8"], "train.memory"),
        (["train.memory=nvfp4", "train.trains=all"], "trains must be adapter"),
        (["train.distill.ce_weight=0.5", "train.distill.tokens=all"], "tokens must be replies"),
        (["train.distill.ce_weight=1.5"], "train.distill.ce_weight"),
        (["train.allow=[memory, memory]"], "named twice"),
        (["train.allow=[everything]"], "train.allow"),
        (["train.distill.replies={}"], "a count or a file"),
        (["train.distill.replies={count: 3, file: x.jsonl}"], "a count or a file"),
    ],
)
def test_what_is_refused(settings: list[str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("annie_tiny", settings)
    assert words in str(caught.value)


def test_the_modes() -> None:
    train = load_recipe("annie_tiny").train
    assert (train.trains, train.memory, train.allow, train.distill.ce_weight) == ("adapter", "bf16", (), 0.0)
    settings = ["train.memory=nvfp4", "train.allow=[thin_mask]", "train.distill.ce_weight=1.0"]
    train = load_recipe("annie_tiny", [*settings, "train.distill.replies={count: 3}"]).train
    assert (train.memory, train.allow, train.distill.ce_weight) == ("nvfp4", ("thin_mask",), 1.0)
    assert train.distill.replies is not None and train.distill.replies.max_new_tokens == 256
    assert load_recipe("annie_tiny", ["train.trains=all"]).train.trains == "all"


def test_all_weights_have_a_rate_of_their_own() -> None:
    """Where none is given: 1e-5, published for Nemotron 3 Nano; the default of factors would wreck weights."""
    content = load_recipe("annie_tiny").model_dump(mode="json")
    for stage in ("sft", "distill"):
        del content["train"][stage]["learning_rate"]
    rates = []
    for trains in ("adapter", "all"):
        content["train"]["trains"] = trains
        train = Recipe.model_validate(content).train
        rates.append((train.sft.learning_rate, train.distill.learning_rate))
    assert rates == [(1e-3, 3e-4), (1e-5, 1e-5)]
    content["train"]["distill"]["learning_rate"] = 2e-6
    assert Recipe.model_validate(content).train.distill.learning_rate == 2e-6


def test_a_file_of_replies_that_is_not_there() -> None:
    """Said by the recipe's check, not after fine-tuning and calibration."""
    with pytest.raises(UserError, match=r"train\.distill\.replies\.file: no such file"):
        load_recipe("annie_tiny", ["train.distill.replies={file: nowhere.jsonl}"])
