"""A synthetic run folder, built by code: what `qat run` leaves, with numbers that tests know."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

ARMS = ("base", "bf16", "nvfp4_all_ptq", "nvfp4_all_qad")
CATEGORIES = ("concise_voice", "direct_action", "honest_memory", "kannada_culture", "topic_switch")


def rate(passed: int, n: int) -> dict[str, Any]:
    """Wilson interval at 95 %, written out."""
    z, p = 1.959964, passed / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((centre + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    return {"passed": passed, "n": n, "rate": p, "low": low, "high": high, "reason": None}


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    else:
        path.write_text(json.dumps(content), encoding="utf-8")


def stage(seconds: float, **more: Any) -> dict[str, Any]:
    return {
        "status": "done",
        "fingerprint": "f",
        "inputs": {},
        "outputs": {},
        "notes": {},
        "seconds": seconds,
        "peak_rss_mb": 900.0 + seconds,
        **more,
    }


def build_run(folder: Path, text: str = "") -> Path:
    """Write a whole run; `text` stands in every place that holds words of people or models."""
    recipe = {
        "name": "annie_tiny",
        "description": "Annie on the tiny base" + text,
        "arms": [
            {"name": "base", "kind": "base"},
            {"name": "bf16", "kind": "persona"},
            {"name": "nvfp4_all_ptq", "kind": "ptq", "preset": "all"},
            {"name": "nvfp4_all_qad", "kind": "distilled", "preset": "all"},
        ],
        "behavior": {"gate": GATE},
    }
    write(folder / "recipe.yaml", yaml.safe_dump(recipe))
    write(
        folder / "divergence.json",
        {
            "nvfp4_all_ptq": {"kl": 0.0831, "top1": 0.943, "tokens": 4100},
            "nvfp4_all_qad": {"kl": 0.0079, "top1": 0.981, "tokens": 4100, "router": {"changed": 0.0314}},
        },
    )
    write(folder / "verdict.json", verdict(text))
    write(folder / "data" / "audit.json", audit(text))
    write(folder / "sft" / "log.jsonl", sft_log())
    write(folder / "distill" / "all" / "log.jsonl", distill_log())
    for arm in ARMS[1:]:
        write(folder / "export" / arm / "model.safetensors", "x" * (8_000_000 if arm == "bf16" else 2_600_000))
        write(folder / "behavior" / f"{arm}.jsonl", results(arm, text))
    write(folder / "receipt.json", receipt())
    return folder


GATE = {
    "candidate": "nvfp4_all_qad",
    "reference": "bf16",
    "sampling": "greedy",
    "pass_floor": 0.9,
    "max_drop": 0.03,
    "confidence": 0.95,
}


def verdict(text: str) -> dict[str, Any]:
    passed = {"base": 21, "bf16": 117, "nvfp4_all_ptq": 101, "nvfp4_all_qad": 114}
    arms = {
        arm: {
            "overall": rate(count, 120),
            "categories": {
                name: rate(min(24, max(0, count // 5 + shift)), 24)
                for shift, name in zip((-1, 0, 0, 1, 0), CATEGORIES, strict=True)
            },
            "samplings": {"greedy": rate(count, 120), "production": rate(max(0, count - 4), 120)},
        }
        for arm, count in passed.items()
    }
    comparisons = [
        {
            "arm": arm,
            "reference": "bf16",
            "sampling": "greedy",
            "pairs": 120,
            "difference": (passed[arm] - 117) / 120,
            "ci_low": (passed[arm] - 117) / 120 - 0.04,
            "ci_high": (passed[arm] - 117) / 120 + 0.03,
            "p_mcnemar": 0.25,
            "p_holm": 0.5,
            "tost_p": 0.04,
            "margin": 0.03,
            "equivalent": arm == "nvfp4_all_qad",
            "flips_worse": [f"topic_switch-{number:04d}" for number in range(12 if "ptq" in arm else 3)],
            "flips_better": [],
            "categories": [],
            "reason": None,
        }
        for arm in ("base", "nvfp4_all_ptq", "nvfp4_all_qad")
    ]
    return {
        "verdict": "INCONCLUSIVE",
        "reasons": [
            "nvfp4_all_qad passes 114 of 120 (95.0%, 95% interval 89.5% to 97.7%) and neither clearly reaches nor "
            "misses the floor of 90.0%" + text
        ],
        "suite": {"name": "annie_tiny", "version": "1", "sha256": "c" * 64},
        "gate": GATE,
        "arms": arms,
        "comparisons": comparisons,
        "sampling_comparisons": {},
    }


def audit(text: str) -> dict[str, Any]:
    bins = [
        {"from": 120 + 20 * i, "to": 139 + 20 * i, "count": count}
        for i, count in enumerate((4, 18, 41, 77, 80, 52, 20, 6, 2))
    ]
    return {
        "faults": [],
        "warnings": ["3 of 300 rows are longer than 280 tokens and are cut (a-1, a-2, a-3)" + text],
        "conversations": 300,
        "persona": "annie_tiny",
        "max_length": 280,
        "system_prompt": {"equal": 300, "different": 0, "variants": 1},
        "tools": {"equal": 300, "different": 0},
        "tool_calls": {"total": 141, "invalid": 0, "by_tool": {"search_memory": 80, "set_reminder": 61}, "unused": []},
        "tokens": {"rows": 300, "total": 61234, "supervised": 9812, "share": 0.1602},
        "lengths": {"min": 120, "median": 207, "p95": 262, "max": 298, "truncated": 3, "histogram": bins},
        "user_turns": {
            "total": 420,
            "distinct": 411,
            "distinct_share": 0.9786,
            "near_duplicate_turns": 12,
            "near_duplicate_pairs": 7,
        },
        "categories": {name + text: 60 for name in CATEGORIES},
    }


def sft_log() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"step": step, "loss": 0.4 + 2.2 * math.exp(-step / 25), "lr": 1e-3, "seconds": step} for step in range(1, 103)
    ]
    return rows + [
        {"step": step, "eval_loss": 0.5 + 1.9 * math.exp(-step / 25), "seconds": step}
        for step in (17, 34, 51, 68, 85, 102)
    ]


def distill_log() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"step": step, "loss": 0.09 * math.exp(-step / 30) + 0.008} for step in range(1, 101)]
    return rows + [
        {"step": step, "kl": 0.083 * math.exp(-step / 30) + 0.006, "top1": 0.95} for step in (0, 25, 50, 75, 100)
    ]


def results(arm: str, text: str) -> list[dict[str, Any]]:
    rows = []
    for number in range(12):
        good = arm == "bf16" or number >= 3
        call = {
            "id": "c",
            "type": "function",
            "function": {"name": "set_reminder", "arguments": '{"text": "call Amma"}'},
        }
        reply = "I set it for seven." if good else "Sure! 😀 **Reminder** set. Would you like another?"
        failed = (
            []
            if good
            else [{"check": "no_emoji", "detail": "found 😀" + text}, {"check": "no_markdown", "detail": "bold"}][
                : 2 - number % 2
            ]
        )
        rows.append(
            {
                "case": f"topic_switch-{number:04d}",
                "category": "topic_switch",
                "arm": arm,
                "sampling": "greedy",
                "seed": 0,
                "produced": [{"content": "", "tool_calls": [call]}, {"content": reply + text}],
                "passed": good,
                "failed_checks": failed,
                "latency_s": 0.8,
                "completion_tokens": 12,
                "error": None,
            }
        )
    return rows


def receipt() -> dict[str, Any]:
    stages = {
        "data": stage(6.2, outputs={"data/train.jsonl": "1" * 64}),
        "sft": stage(94.0, outputs={"sft/adapter": "2" * 64}),
        "calibrate/all": stage(11.0),
        "distill/all": stage(131.0, outputs={"distill/all/quant_state.safetensors": "3" * 64}),
        "divergence": stage(14.0),
        **{f"export/{arm}": stage(7.0, notes={"bytes": 2_600_000}) for arm in ARMS[1:]},
        **{f"behavior/{arm}": stage(61.0) for arm in ARMS[:-1]},
        f"behavior/{ARMS[-1]}": stage(61.0, notes={"divergence": {"kl": 0.00912}}),
        "gate": stage(0.4),
        "report": stage(0.0, status="running"),
    }
    return {
        "qat": "0.1.0",
        "recipe": {"name": "annie_tiny", "sha256": "a" * 64},
        "environment": {
            "python": "3.11.2",
            "packages": {"torch": "2.13.0", "transformers": "5.19.0"},
            "cpu": "two cores",
            "threads": 2,
        },
        "stages": stages,
    }


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return build_run(tmp_path / "annie_tiny")


@pytest.fixture
def hostile_run(tmp_path: Path) -> Path:
    """Markup in every text of people and models."""
    return build_run(tmp_path / "hostile", "<script>alert(1)</script>\"'&<img src=x onerror=y>")
