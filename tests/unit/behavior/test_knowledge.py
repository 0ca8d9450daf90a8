"""The bridge to lm-evaluation-harness: by a stand-in for it, and by itself where QAT_LM_EVAL names its Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from qat.behavior.compare import compare
from qat.behavior.knowledge import KnowledgeRun, command, run_knowledge, write_task
from qat.behavior.records import read_meta, read_results
from qat.errors import UserError
from tests.unit.behavior.stub_server import completion, serving

STAND_IN = f"""#!{sys.executable}
import json, pathlib, sys
arguments = sys.argv[1:]
if arguments[0] == "-c":
    print("missing" if "nltk" in arguments[1] else "/harness/lm_eval")
    sys.exit()
given = dict(zip(arguments, arguments[1:]))
folder = pathlib.Path(given["--output_path"]) / "model"
folder.mkdir(parents=True)
rows = [json.loads(line) for line in open(pathlib.Path(given["--include_path"]) / "test.jsonl")]
if rows[0]["question"] == "fail":
    sys.exit("no such model")
wrong = "wrong" in given["--model_args"]
with open(folder / f"samples_{{given['--tasks']}}_2026.jsonl", "w") as file:
    for number, row in enumerate(rows):
        right = 0.0 if number % 4 == 0 or (wrong and number == 1) else 1.0
        for name in ("strict-match", "flexible-extract"):
            score = right if name == "flexible-extract" else 0.0
            sample = {{"doc_id": number, "doc_hash": row["question"], "prompt_hash": "p", "filter": name,
                "resps": [[f"answer\u2028{{number}}"]], "filtered_resps": ["7"], "exact_match": score}}
            file.write(json.dumps(sample, ensure_ascii=False) + "\\n")
"""


@pytest.fixture
def harness(tmp_path: Path) -> Path:
    path = tmp_path / "python"
    path.write_text(STAND_IN, encoding="utf-8")
    path.chmod(0o755)
    return path


def data(folder: Path, questions: list[str]) -> Path:
    (folder / "gsm8k").mkdir()
    text = "".join(json.dumps({"question": question, "answer": "#### 7"}) + "\n" for question in questions)
    for name in ("test", "train"):
        (folder / "gsm8k" / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_answers_become_results_that_compare(tmp_path: Path, harness: Path) -> None:
    files = data(tmp_path, [f"q{number}" for number in range(40)])
    for model in ("right", "wrong"):
        run_knowledge("gsm8k", KnowledgeRun(harness, files, "http://h:1/v1", model), model, tmp_path / f"{model}.jsonl")
    results = read_results(tmp_path / "right.jsonl").results
    assert len(results) == 40 and sum(one.passed for one in results.values()) == 30
    first = next(one for one in results.values() if one.case == "gsm8k_0")
    assert first.produced[0]["content"] == "answer\u20280" and first.failed_checks[0].check == "exact_match"
    meta = [read_meta(tmp_path / f"{model}.jsonl") for model in ("right", "wrong")]
    assert meta[0] is not None and meta[1] is not None and meta[0].sha256 == meta[1].sha256
    (found,) = compare(tmp_path / "right.jsonl", tmp_path / "wrong.jsonl")
    assert list(found.flips_worse) == ["gsm8k_1"] and not found.flips_better


def test_definitions_replace_the_data_alone(tmp_path: Path, harness: Path) -> None:
    (tmp_path / "truthfulqa").mkdir()
    entry = {"question": "q", "mc1_targets": {"right": 1, "wrong": 0}}
    (tmp_path / "truthfulqa" / "mc_task.json").write_text(json.dumps([entry]), encoding="utf-8")
    run = KnowledgeRun(harness, tmp_path, "http://h:1/v1/", "m", Path("/checkpoint"), 5)
    write_task("truthfulqa_mc1", run, tmp_path)
    made = yaml.safe_load((tmp_path / "qat_truthfulqa_mc1.yaml").read_text(encoding="utf-8"))
    assert made["include"] == "/harness/lm_eval/tasks/truthfulqa/truthfulqa_mc1.yaml"
    assert made["validation_split"] == "validation" and made["test_split"] is None and "metric_list" not in made
    row = json.loads((tmp_path / "validation.jsonl").read_text(encoding="utf-8"))
    assert row == {"question": "q", "mc1_targets": {"choices": ["right", "wrong"], "labels": [1, 0]}}
    argv = " ".join(command("truthfulqa_mc1", run, tmp_path))
    assert "base_url=http://h:1/v1/completions," in argv and "tokenizer=/checkpoint" in argv and "--limit 5" in argv
    assert "--apply_chat_template" not in argv and "--apply_chat_template" in command("gsm8k", run, tmp_path)


def test_faults_are_named(tmp_path: Path, harness: Path) -> None:
    run = KnowledgeRun(harness, tmp_path, "http://h:1", "m")
    out = tmp_path / "out.jsonl"
    for name, message in (("gsm9k", "no such"), ("medmcqa", "tokenizer"), ("gsm8k", "cannot be read")):
        with pytest.raises(UserError, match=message):
            run_knowledge(name, run, "a", out)
    data(tmp_path, ["fail"])
    with pytest.raises(UserError, match="no such model"):
        run_knowledge("gsm8k", run, "a", out)
    (tmp_path / "ifeval").mkdir()
    (tmp_path / "ifeval" / "input_data.jsonl").write_text("{}\n", encoding="utf-8")
    with pytest.raises(UserError, match="punkt_tab"):
        run_knowledge("ifeval", run, "a", out)
    with pytest.raises(UserError, match="does not start"):
        run_knowledge("gsm8k", run._replace(python=tmp_path / "none"), "a", out)
    assert not out.exists()
    out.touch()
    with pytest.raises(UserError, match="exists"):
        run_knowledge("gsm8k", run, "a", out)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gsm8k", "ifeval", "medmcqa", "truthfulqa_mc1"])
def test_the_real_harness(name: str, tmp_path: Path, real_data: Path) -> None:
    named = os.environ.get("QAT_LM_EVAL")
    if named is None:
        pytest.skip("no Python of an environment with lm_eval (set QAT_LM_EVAL)")
    if name == "ifeval" and subprocess.run([named, "-c", "import nltk; nltk.PunktTokenizer()"], check=False).returncode:
        pytest.skip("no punkt_tab of NLTK in that environment")

    def answer(body: dict[str, Any], number: int) -> tuple[int, dict[str, Any]]:
        """Chat: the right answer to the first question of GSM8K; likelihoods: the shorter, the likelier."""
        if "messages" in body:
            return 200, completion("It is 18.")
        prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        choices = []
        for index, tokens in enumerate(prompts):
            scores = [-1.0 - token / 1e6 for token in (*tokens, 0)]
            logprobs = {"token_logprobs": scores, "top_logprobs": [{"x": score} for score in scores]}
            choices.append({"index": index, "logprobs": logprobs, "text": ""})
        return 200, {"choices": choices}

    with serving(answer) as stub:
        run = KnowledgeRun(Path(named), real_data, stub.url, "m", real_data / "qwen3_tokenizer", 6)
        results = run_knowledge(name, run, "a", tmp_path / "out.jsonl")
    assert [one.case for one in sorted(results, key=lambda one: one.case)] == [f"{name}_{n}" for n in range(6)]
    if name == "gsm8k":
        assert [one.case for one in results if one.passed] == ["gsm8k_0"]
    if name == "medmcqa":
        # The stub finds the smallest token id likeliest; `cop` is the place of the right answer.
        vocabulary = json.loads((real_data / "qwen3_tokenizer" / "vocab.json").read_text(encoding="utf-8"))
        chosen = min(range(4), key=lambda place: vocabulary["Ġ" + "ABCD"[place]])
        rows = [json.loads(line) for line in (real_data / "medmcqa/validation_opa_layout.jsonl").open()][:6]
        right = {f"medmcqa_{n}": row["cop"] == chosen for n, row in enumerate(rows)}
        assert {one.case: one.passed for one in results} == right and any(right.values())
