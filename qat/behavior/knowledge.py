"""Knowledge tasks through lm-evaluation-harness (`lm_eval`), their answers as results of ours.

The harness lives in an environment of its own, as vLLM does, and runs as a process: its requirements never meet ours.
It is given its own task definitions with nothing changed but the data, which come from local files, and it asks the
server by itself. What it logs of every question becomes a result file, so arms are compared on knowledge case by case
as they are on behaviour.

GSM8K and IFEval are written answers and go through the chat endpoint. MedMCQA and TruthfulQA (mc1) compare the
likelihoods of given answers; that needs `/v1/completions` with prompt logprobs, as vLLM has it, and the checkpoint's
tokenizer, with which the harness finds where an answer begins.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from qat.behavior.journal import Journal
from qat.behavior.records import CaseResult, FailedCheck, ResultMeta, canonical_json, meta_path
from qat.errors import UserError
from qat.runs import write_atomic

SAMPLING = "greedy"
_NAME = "qat_"


def _json_lines(path: Path) -> list[dict[str, Any]]:
    # Not `splitlines`: JSON allows its other line breaks, such as U+2028, inside texts, and models write them.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def _mc_task(path: Path) -> list[dict[str, Any]]:
    """TruthfulQA's own `mc_task.json` in the columns of its data set, right answers first as they stand there."""
    return [
        {
            "question": entry["question"],
            "mc1_targets": {"choices": list(entry["mc1_targets"]), "labels": list(entry["mc1_targets"].values())},
        }
        for entry in json.loads(path.read_text(encoding="utf-8"))
    ]


class Task(NamedTuple):
    """A task of the harness.

    Attributes:
        source: Its definition below `lm_eval/tasks`.
        file: The local data file asked for.
        read: Rows of that file in the columns that the definition reads.
        split: The split that is asked.
        metric: 1 or True where the answer is right.
        filter: Which of the harness's readings of the answer counts.
        chat: A written answer by chat; otherwise likelihoods of given answers.
        shots: The split that worked examples are drawn from, and its file.
        sentences: Answers are judged by their sentences, for which the harness needs data of NLTK.
    """

    source: str
    file: str
    read: Callable[[Path], list[dict[str, Any]]]
    split: str
    metric: str
    filter: str
    chat: bool
    shots: tuple[str, str] | None = None
    sentences: bool = False


TASKS: dict[str, Task] = {
    "gsm8k": Task(
        "gsm8k/gsm8k.yaml",
        "gsm8k/test.jsonl",
        _json_lines,
        "test",
        "exact_match",
        "flexible-extract",
        True,
        ("train", "gsm8k/train.jsonl"),
    ),
    "ifeval": Task(
        "ifeval/ifeval.yaml",
        "ifeval/input_data.jsonl",
        _json_lines,
        "train",
        "prompt_level_strict_acc",
        "none",
        True,
        sentences=True,
    ),
    "medmcqa": Task(
        "medmcqa/medmcqa.yaml",
        "medmcqa/validation_opa_layout.jsonl",
        _json_lines,
        "validation",
        "acc",
        "none",
        False,
    ),
    "truthfulqa_mc1": Task(
        "truthfulqa/truthfulqa_mc1.yaml", "truthfulqa/mc_task.json", _mc_task, "validation", "acc", "none", False
    ),
}
"""Tasks by name. TruthfulQA's mc2 is a share of probability and no right or wrong; it makes no pass rate."""


class KnowledgeRun(NamedTuple):
    """What is asked of whom.

    Attributes:
        python: Interpreter of the harness's environment.
        data: Folder of the local files.
        url: Root of the server, with or without `/v1`.
        model: Name at the server.
        tokenizer: Checkpoint folder; needed by tasks of likelihoods.
        limit: Only the first n questions; None: all.
        concurrency: Requests under way together.
    """

    python: Path
    data: Path
    url: str
    model: str
    tokenizer: Path | None = None
    limit: int | None = None
    concurrency: int = 8


def run_knowledge(name: str, run: KnowledgeRun, arm: str, out: Path) -> list[CaseResult]:
    """Ask one task and write its result file, `<out>.meta.json` beside it.

    Raises:
        UserError: Unknown task, missing data, harness or NLTK data, a task of likelihoods without a tokenizer, an `out`
            that exists, or the harness failed; its last lines stand in the message.
    """
    if name not in TASKS:
        raise UserError("There is no such knowledge task.", value=name, remedy=f"one of {', '.join(TASKS)}")
    task = TASKS[name]
    if out.exists():
        raise UserError("The result file exists.", where=str(out), remedy="remove it, or write to another file")
    if not task.chat and run.tokenizer is None:
        raise UserError("This task needs the tokenizer of the checkpoint.", value=name, remedy="add --tokenizer FOLDER")
    with tempfile.TemporaryDirectory(prefix="qat-eval-") as scratch:
        folder = Path(scratch)
        write_task(name, run, folder)
        if task.sentences:
            _require_sentences(run.python)
        _call(command(name, run, folder), run.python, f"mend what its last lines say; the server is to be at {run.url}")
        logged = sorted((folder / "out").rglob(f"samples_{_NAME}{name}_*.jsonl"))
        if not logged:
            raise UserError("The harness logged no answers.", where=str(run.python), value=name)
        samples = [sample for sample in _json_lines(logged[-1]) if sample.get("filter") == task.filter]
    results = list(results_of(name, samples, arm))
    questions = sorted((sample["doc_id"], sample["doc_hash"], sample["prompt_hash"]) for sample in samples)
    meta = ResultMeta(
        suite=f"lm_eval_{name}",
        version="0",
        sha256=hashlib.sha256(canonical_json(questions)).hexdigest(),
        model=run.model,
        max_tokens=0 if not task.chat else MAX_TOKENS,
        samplings={SAMPLING: {"temperature": 0.0, "top_p": 1.0}},
    )
    write_atomic(meta_path(out), meta.model_dump_json(indent=2) + "\n")
    with Journal(out) as journal:
        for result in results:
            journal.append(result)
    return results


MAX_TOKENS = 1280
"""Longest written answer; IFEval's own limit."""


def write_task(name: str, run: KnowledgeRun, folder: Path) -> None:
    """Write the task's data and definition: the harness's own, with the data replaced by local files."""
    task = TASKS[name]
    files = {task.split: _rows(task.read, run.data / task.file)}
    if task.shots is not None:
        files[task.shots[0]] = _rows(_json_lines, run.data / task.shots[1])
    for split, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    definition = {
        "include": str(_harness(run.python) / "tasks" / task.source),
        "task": _NAME + name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(folder / f"{split}.jsonl") for split in files}},
    }
    if task.shots is None:
        # Definitions name splits that only the whole data set has.
        definition |= {"training_split": None, "fewshot_split": None}
        definition |= {f"{'test' if task.split == 'train' else task.split}_split": task.split}
        definition |= {"test_split": None} if task.split == "validation" else {}
    (folder / f"{_NAME}{name}.yaml").write_text(yaml.safe_dump(definition), encoding="utf-8")


def _rows(read: Callable[[Path], list[dict[str, Any]]], path: Path) -> list[dict[str, Any]]:
    try:
        return read(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            "A data file cannot be read.", where=str(path), value=f"{type(error).__name__}: {error}"
        ) from error


def command(name: str, run: KnowledgeRun, folder: Path) -> list[str]:
    """The harness's command line."""
    task = TASKS[name]
    root = run.url.rstrip("/").removesuffix("/v1")
    endpoint = "chat/completions" if task.chat else "completions"
    settings = [f"model={run.model}", f"base_url={root}/v1/{endpoint}", f"num_concurrent={run.concurrency}"]
    if task.chat:
        settings += [f"max_gen_toks={MAX_TOKENS}"]
    else:
        settings += [f"tokenizer={run.tokenizer}", "tokenizer_backend=huggingface", "tokenized_requests=True"]
    return [
        *(str(run.python), "-m", "lm_eval", "run"),
        *("--model", "local-chat-completions" if task.chat else "local-completions"),
        *("--model_args", ",".join(settings)),
        *("--tasks", _NAME + name, "--include_path", str(folder)),
        *("--output_path", str(folder / "out"), "--log_samples"),
        *(("--apply_chat_template",) if task.chat else ()),
        *(("--limit", str(run.limit)) if run.limit is not None else ()),
    ]


def _harness(python: Path) -> Path:
    """Folder of the package `lm_eval`."""
    code = "import importlib.util; print(importlib.util.find_spec('lm_eval').submodule_search_locations[0])"
    return Path(_call([str(python), "-c", code], python).strip())


def _require_sentences(python: Path) -> None:
    """Load NLTK's data before anything is asked: the harness misses them when it reads the answers, and loses all."""
    code = "from nltk.tokenize import PunktTokenizer\ntry: PunktTokenizer()\nexcept LookupError: print('missing')"
    if _call([str(python), "-c", code], python).strip() == "missing":
        raise UserError(
            "The harness judges this task with data of NLTK that are missing.",
            where=str(python),
            value="punkt_tab",
            remedy=f"{python} -m nltk.downloader punkt_tab, or copy it to tokenizers/ of a folder that NLTK_DATA names",
        )


_INSTALL = 'make an environment with "lm_eval[api,ifeval]", and transformers for tasks of likelihoods'


def _call(argv: Sequence[str], python: Path, remedy: str = _INSTALL) -> str:
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(argv, env=os.environ | offline, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError("The harness's Python does not start.", where=str(python), value=str(error)) from error
    if done.returncode:
        raise UserError(
            "lm-evaluation-harness failed.",
            where=str(python),
            value="\n          ".join(done.stderr.strip().splitlines()[-8:]),
            remedy=remedy,
        )
    return done.stdout


def results_of(name: str, samples: Iterable[dict[str, Any]], arm: str) -> Iterable[CaseResult]:
    """The harness's logged samples as results; the case's id is the place of the question in the data.

    Times and tokens are not logged by the harness and stand as 0.
    """
    task = TASKS[name]
    for sample in samples:
        right = float(sample[task.metric]) == 1.0
        answer = sample["resps"] if task.chat else sample["filtered_resps"]
        while isinstance(answer, list) and len(answer) == 1:
            answer = answer[0]
        text = answer if isinstance(answer, str) else json.dumps(answer)
        yield CaseResult(
            case=f"{name}_{sample['doc_id']}",
            category=name,
            arm=arm,
            sampling=SAMPLING,
            seed=0,
            produced=[{"role": "assistant", "content": text}],
            passed=right,
            failed_checks=[] if right else [FailedCheck(check=task.metric, detail=f"{sample[task.metric]}")],
            latency_s=0.0,
            completion_tokens=0,
        )
