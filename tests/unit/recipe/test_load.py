"""Recipes: what is read, which faults are reported, where, and that they come all at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qat.errors import UserError
from qat.recipe.load import Fault, RecipeError, check_recipe, find_recipe, load_recipe, recipe_names
from qat.recipe.tree import parse_recipe_text

# Line numbers below are counted by hand in this text.
TEXT = """\
name: sample
base:
  model: tiny-base
persona: annie_tiny
data: {source: generated, count: 20}
train:
  sft:
    epochs: 2
    learning_rate: 1e-3
arms:
  - {name: base, kind: base}
  - {name: bf16, kind: persona}
  - name: four
    kind: distilled
    preset: all
behavior:
  suite: annie_tiny
  gate: {candidate: four, reference: bf16}
"""
Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def writer(text: str) -> Path:
        path = tmp_path / "sample.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return writer


def only(faults: list[Fault]) -> Fault:
    assert len(faults) == 1, [str(fault) for fault in faults]
    return faults[0]


def test_values_and_defaults(write: Write) -> None:
    recipe = load_recipe(write(TEXT))
    assert recipe.train.sft.epochs == 2
    assert recipe.train.sft.learning_rate == 0.001  # YAML 1.1 would read `1e-3` as a text
    assert recipe.train.sft.batch_size == 8
    assert recipe.quant.kv_cache == "bf16"
    assert [arm.name for arm in recipe.arms] == ["base", "bf16", "four"]
    assert recipe.presets == ("all",) == recipe.distilled_presets
    assert recipe.distill_adapter is recipe.train.adapter
    assert [sampling.name for sampling in recipe.behavior.sampling] == ["greedy"]


def test_resolved_text_gives_the_same_recipe(write: Write) -> None:
    recipe = load_recipe(write(TEXT))
    again = load_recipe(write(recipe.to_yaml()))
    assert again == recipe
    assert again.sha256 == recipe.sha256
    assert load_recipe(write(TEXT), ["seed=8"]).sha256 != recipe.sha256


def test_blocks_are_frozen(write: Write) -> None:
    recipe = load_recipe(write(TEXT))
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.sft.epochs = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("old", "new", "line", "key", "words"),
    [
        ("epochs: 2", "epochz: 2", 8, "train.sft.epochz", ["unknown key", "did you mean 'epochs'"]),
        ("epochs: 2", "epochs: two", 8, "train.sft.epochs", ["'two'", "an integer"]),
        ("epochs: 2", "epochs: '2'", 8, "train.sft.epochs", ["an integer"]),
        ("epochs: 2", "epochs: true", 8, "train.sft.epochs", ["an integer"]),
        ("epochs: 2", "epochs: 0", 8, "train.sft.epochs", ["got 0", ">= 1"]),
        ("epochs: 2", "epochs:", 8, "train.sft.epochs", ["an integer"]),
        ("1e-3", ".nan", 9, "train.sft.learning_rate", ["a finite number"]),
        ("1e-3", "2", 9, "train.sft.learning_rate", ["<= 1.0"]),
        ("name: sample", "name: Sample 1", 1, "name", ["[a-z0-9_]+"]),
        ("name: sample\n", "", 1, "name", ["missing"]),
        ("count: 20", "count: 20, seeds: 3", 5, "data.seeds", ["unknown key", "'seed'"]),
        ("kind: distilled", "kind: destilled", 14, "arms.2.kind", ["'distilled'", "base, persona, ptq, distilled"]),
        ("preset: all", "preset: al", 15, "arms.2.preset", ["unknown preset", "did you mean 'all'"]),
        ("preset: all", "preset: mixed", 15, "arms.2.preset", ["unknown preset"]),
        ("    preset: all\n", "", 13, "arms.2.preset", ["needs a preset"]),
        ("kind: persona", "kind: persona, preset: all", 12, "arms.1.preset", ["takes no preset"]),
        (
            "name: bf16, kind: persona}",
            "name: bf16, kind: persona}\n  - {name: base, kind: ptq, preset: all}",
            13,
            "arms.2.name",
            ["two arms"],
        ),
        ("candidate: four", "candidate: fuor", 18, "behavior.gate.candidate", ["no arm", "did you mean 'four'"]),
        ("reference: bf16", "reference: four", 18, "behavior.gate.candidate", ["reference"]),
        ("reference: bf16", "reference: bf16, sampling: hot", 18, "behavior.gate.sampling", ["greedy"]),
        ("count: 20", "count: null", 5, "data.count", ["need a count"]),
        ("persona: annie_tiny", "persona: annie_tin", 4, "persona", ["no such name", "did you mean 'annie_tiny'"]),
        ("suite: annie_tiny", "suite: annie_tin", 17, "behavior.suite", ["no such name"]),
        ("source: generated, count: 20", "source: missing.jsonl", 5, "data.source", ["no such file"]),
        ("model: tiny-base", "model: tiny-base\n  trust_remote_code: true", 4, "base.trust_remote_code", ["false"]),
        ("model: tiny-base", "model: tiny-base\n  dtype: float16", 4, "base.dtype", ["bfloat16"]),
        ("model: tiny-base", "model: tiny-base\n  revision: abc", 4, "base.revision", ["no revisions"]),
        ("train:", "serve: {max_model_len: 96}\ntrain:", 17, "behavior.max_tokens", ["no room"]),
        ("train:", "train:\n  adapter: {dropout: 0.1}", 7, "train.adapter.dropout", ["must be 0"]),
        ("train:", "train:\n  adapter: {targets: []}", 7, "train.adapter.targets", ["at least one"]),
        ("train:", "train:\n  adapter: {targets: [mambo]}", 7, "train.adapter.targets.0", ["did you mean 'mamba'"]),
        ("train:", "train:\n  adapter: 3", 7, "train.adapter", ["a mapping of keys: rank, alpha"]),
    ],
)
def test_fault_names_line_key_value_and_remedy(
    write: Write, old: str, new: str, line: int, key: str, words: list[str]
) -> None:
    assert old in TEXT
    fault = only(check_recipe(write(TEXT.replace(old, new, 1))))
    assert (fault.line, fault.key) == (line, key)
    for word in words:
        assert word in str(fault)


def test_fresh_prompts_need_the_generator(write: Write, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text("{}\n", encoding="utf-8")
    prompts = "train:\n  distill: {prompts: {count: 30, joined: 3}}"
    text = TEXT.replace("train:", prompts, 1)
    assert not check_recipe(write(text))
    fault = only(check_recipe(write(text.replace("generated, count: 20", str(tmp_path / "mine.jsonl")))))
    assert fault.key == "train.distill.prompts" and "leave prompts out" in str(fault)


def test_line_of_a_fault_between_blocks_is_found_by_counting(write: Write) -> None:
    """The line is that of the key as a reader counts it, however far down and however the text is laid out."""
    text = TEXT.replace("  suite: annie_tiny\n", "  # remark\n\n  suite: annie_tiny\n  max_tokens: 4096\n")
    fault = only(check_recipe(write(text)))
    assert text.splitlines()[(fault.line or 0) - 1].strip() == "max_tokens: 4096"


def test_all_faults_at_once(write: Write) -> None:
    text = (
        TEXT.replace("epochs: 2", "epochz: 2").replace("1e-3", "fast").replace("candidate: four", "candidate: five")
    ).replace("persona: annie_tiny", "persona: anny")
    faults = check_recipe(write(text), ["data.seed=x", "train.distill.max_steps=0", "nonsense"])
    assert {fault.key for fault in faults} == {
        "train.sft.epochz",
        "train.sft.learning_rate",
        "behavior.gate.candidate",  # shows although other blocks have faults
        "persona",
        "data.seed",
        "train.distill.max_steps",
        "",
    }
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(text), ["data.seed=x"])
    message = str(caught.value)
    assert "5 faults" in message and "epochz" in message and "--set: data.seed" in message
    again, values = caught.value.__reduce__()  # how an exception crosses from a worker process
    assert callable(again) and isinstance(values, tuple) and again(*values).faults == caught.value.faults


def test_presets_of_one_family_are_refused_in_another(write: Write) -> None:
    text = TEXT.replace("model: tiny-base", "model: tiny-base\n  family: llama")
    text = text.replace("train:", "train:\n  adapter: {targets: [attention, mamba]}").replace(
        "preset: all", "preset: nvidia-nano"
    )
    keys = {fault.key: fault for fault in check_recipe(write(text))}
    assert set(keys) == {"train.adapter.targets.1", "arms.2.preset"}
    assert keys["arms.2.preset"].allowed == "all"
    assert keys["train.adapter.targets.1"].allowed == "attention, mlp"


def test_distillation_adapter_without_dropout(write: Write) -> None:
    own = "train:\n  distill: {adapter: {targets: [attention], dropout: 0.1}}"
    assert only(check_recipe(write(TEXT.replace("train:", own, 1)))).key == "train.distill.adapter.dropout"
    shared = "train:\n  adapter: {targets: [attention], dropout: 0.1}"
    assert only(check_recipe(write(TEXT.replace("train:", shared, 1)))).key == "train.adapter.dropout"
    without = TEXT.replace("train:", shared, 1).replace("distilled", "ptq")
    assert check_recipe(write(without)) == []  # nothing is distilled: dropout in fine-tuning is fine


@pytest.mark.parametrize(
    ("sampling", "key"),
    [
        ("[{name: a, seeds: [1, 2]}]", "behavior.sampling.0.seeds"),
        ("[{name: a, temperature: 0.5, seeds: [1, 1]}]", "behavior.sampling.0.seeds.1"),
        ("[{name: a}, {name: a, temperature: 1}]", "behavior.sampling.1.name"),
        ("[{name: a, top_p: 0}]", "behavior.sampling.0.top_p"),
        ("[{name: a, seeds: []}]", "behavior.sampling.0.seeds"),
        ("[]", "behavior.sampling"),
        ("greedy", "behavior.sampling"),
    ],
)
def test_sampling_faults(write: Write, sampling: str, key: str) -> None:
    text = TEXT.replace("reference: bf16}", f"reference: bf16, sampling: a}}\n  sampling: {sampling}")
    assert key in {fault.key for fault in check_recipe(write(text))}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "nothing"),
        ("- a\n- b\n", "a list"),
        ("just words\n", "a single value"),
        ("name: [a\n", "not valid YAML"),
        ("name: a\n\tbase: b\n", "not valid YAML"),
        ("a: &x {b: *x}\n", "contains itself"),
        ("name: !!python/object:os.system a\n", "not valid YAML"),
        ("name: a\n---\nname: b\n", "not valid YAML"),
        ("[" * 3000, "not valid YAML"),
        ("name: a\nname: b\n", "stands twice"),
        ("? [a, b]\n: c\n", "not valid YAML"),
    ],
)
def test_broken_texts(write: Write, text: str, words: str) -> None:
    faults = check_recipe(write(text))
    assert any(words in fault.problem for fault in faults), [str(fault) for fault in faults]


def test_repeated_key_is_reported_beside_other_faults(write: Write) -> None:
    faults = check_recipe(write(TEXT.replace("epochs: 2", "epochs: 0") + "persona: annie_tiny\n"))
    assert [(fault.line, fault.key) for fault in faults] == [(8, "train.sft.epochs"), (19, "persona")]


def test_yaml_words_stay_words() -> None:
    tree = parse_recipe_text("a: no\nb: 2026-01-01\nc: 010\nd: 1e3\ne: ~\nf: true\ng: .5\nh: -3\ni: 1_000\n", "x")
    assert tree.data == {
        "a": "no", "b": "2026-01-01", "c": 10, "d": 1000.0, "e": None, "f": True, "g": 0.5, "h": -3, "i": "1_000",
    }  # fmt: skip


def test_overrides(write: Write) -> None:
    overrides = [
        "train.sft.epochs=5",
        "train.distill.adapter.rank=4",  # makes the block
        "arms.2.name=other",
        "behavior.gate.candidate=other",
        "train.adapter.targets=[attention, routed_experts]",
        "train.sft.learning_rate=2e-4",
        "description=a = b",
    ]
    recipe = load_recipe(write(TEXT), overrides)
    assert recipe.train.sft.epochs == 5
    assert recipe.train.distill.adapter is not None and recipe.train.distill.adapter.rank == 4
    assert recipe.arms[2].name == "other"
    assert recipe.train.adapter.targets == ("attention", "routed_experts")
    assert recipe.train.sft.learning_rate == 0.0002
    assert recipe.description == "a = b"


@pytest.mark.parametrize(
    ("override", "key", "words"),
    [
        ("train.sft.epochz=5", "train.sft.epochz", "did you mean 'epochs'"),
        ("train.sfd.epochs=5", "train.sfd", "did you mean 'sft'"),
        ("epochs", "", "dotted.key=value"),
        ("=5", "", "dotted.key=value"),
        ("a..b=5", "", "dotted.key=value"),
        ("arms.7.name=x", "arms.7.name", "0 to 2"),
        ("arms.first.name=x", "arms.first.name", "is a list"),
        ("name.first=x", "name.first", "single value"),
        ("train.sft.epochs={", "train.sft.epochs", "not YAML"),
        ("train.sft=5", "train.sft", "a mapping of keys"),
    ],
)
def test_faults_of_overrides_name_the_option(write: Write, override: str, key: str, words: str) -> None:
    fault = only(check_recipe(write(TEXT), [override]))
    assert (fault.file, fault.line, fault.key) == ("--set", None, key)
    assert words in str(fault)


def test_unknown_names_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'annie_tiny'"):
        find_recipe("anny_tiny")
    with pytest.raises(UserError, match="no such recipe file"):
        load_recipe(tmp_path / "missing.yaml")
    with pytest.raises(UserError, match="folder"):
        load_recipe(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(UserError, match=r"not UTF-8[\s\S]*byte 9"):
        load_recipe(tmp_path / "latin.yaml")


def test_shipped_recipes_have_the_fixed_settings() -> None:
    """What the project promised for them, read from the files anew."""
    assert set(recipe_names()) >= {"annie_tiny", "annie_tiny_full", "annie_v4", "annie_qwen"}
    recipes = {name: load_recipe(name) for name in recipe_names()}
    assert all(recipe.name == name for name, recipe in recipes.items())
    v4 = recipes["annie_v4"]
    assert v4.base.model == "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"
    assert (v4.train.adapter.rank, v4.train.adapter.alpha, v4.train.adapter.dropout) == (16, 32, 0)
    assert set(v4.train.adapter.targets) == {"attention", "mamba", "routed_experts", "shared_experts"}
    assert (v4.data.count, v4.train.sft.epochs, v4.data.max_length) == (999, 3, 2048)
    assert v4.train.sft.batch_size * v4.train.sft.gradient_accumulation == 8
    assert (v4.presets, v4.quant.kv_cache) == (("nvidia-nano",), "fp8")
    assert recipes["annie_qwen"].quant.kv_cache == "bf16"
    tiny, full = recipes["annie_tiny"], recipes["annie_tiny_full"]
    assert (tiny.data.count, [arm.name for arm in tiny.arms]) == (
        300, ["base", "bf16", "nvfp4_all_ptq", "nvfp4_all_qad"]
    )  # fmt: skip
    assert (full.data.count, full.presets, len(full.arms)) == (999, ("all", "nvidia-nano"), 6)
    assert full.behavior.gate.max_drop == 0.03
    assert len(full.behavior.sampling) == 2 and len(full.behavior.sampling[1].seeds) > 1


OWN = "quant: {presets: {mine: {like: all, bf16: [backbone.layers.0.*]}}}\n"


def test_own_presets(write: Write) -> None:
    recipe = load_recipe(write(OWN + TEXT.replace("preset: all", "preset: mine")))
    assert recipe.presets == ("mine",)
    assert recipe.quant.presets["mine"].bf16 == ("backbone.layers.0.*",)
    again = load_recipe(write(recipe.to_yaml()))
    assert again == recipe and again.sha256 == recipe.sha256


@pytest.mark.parametrize(
    ("change", "key", "words"),
    [
        (
            ("mine: {like: all", "mine: {like: everything"),
            "quant.presets.mine.like",
            ["not an allowed value", "lightning"],
        ),
        (("mine: {like", "Mine: {like"), "quant.presets.Mine.[key]", ["not a valid name"]),
        (("bf16: [", "bf61: ["), "quant.presets.mine.bf61", ["unknown key", "'bf16'", "w4a16"]),
        (("mine: {like", "conservative: {like"), "quant.presets.conservative", ["shipped preset"]),
        (("bf16: [backbone.layers.0.*]", "bf16: 3"), "quant.presets.mine.bf16", ["a list"]),
    ],
)
def test_faults_of_own_presets(write: Write, change: tuple[str, str], key: str, words: list[str]) -> None:
    fault = only(check_recipe(write(OWN.replace(*change) + TEXT)))
    assert fault.key == key and fault.line == 1
    assert all(word in str(fault) for word in words), str(fault)


def test_an_own_preset_of_another_family(write: Write) -> None:
    text = OWN.replace("like: all", "like: lightning") + TEXT
    faults = check_recipe(write(text), ["base.family=llama", "train.adapter.targets=[attention]"])
    assert [fault.key for fault in faults] == ["quant.presets.mine.like"]
