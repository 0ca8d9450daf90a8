from __future__ import annotations

from pathlib import Path

import pytest

from qat.calibration import calibrate
from qat.calibration.sensitivity import EVERYTHING, Score, Sensitivity
from qat.calibration.study import ALGORITHMS, BUDGETS, Persona, cases, page, run_case
from qat.quant.presets import PRESETS
from qat.train.divergence import measure
from tests.unit.calibration.test_run import Given
from tests.unit.train import world

UP = "backbone.layers.1.mixer.experts.up_proj"
DOWN = "backbone.layers.1.mixer.experts.down_proj"
FOUND = Sensitivity(
    kinds=[Score(EVERYTHING, "nvfp4", [UP, DOWN], 10_000, 2_840, 0.6, 0.01, 0.9)],
    groups=[
        Score("0.mamba.in_proj", "nvfp4", ["backbone.layers.0.mixer.in_proj"], 2_000, 570, 0.5, 0.01, 0.91),
        Score("1.experts", "nvfp4", [UP, DOWN], 8_000, 2_270, 0.1, None, 0.98),
    ],
    fixed_bytes=1_000,
    conversations=4,
    tokens=60,
)


def test_cases_by_hand() -> None:
    found = dict(cases(FOUND))
    assert list(found) == [
        *(f"mix at {share:.0%}" for share in BUDGETS),
        *(f"all, {label}" for label in ALGORITHMS),
        *(f"{preset}, max" for preset in PRESETS),
    ]
    # From 3,840 to 11,000 bytes: half the way keeps the Mamba layer in BF16, a tenth keeps nothing.
    assert found["mix at 50%"]["own"] == {"bf16": ["backbone.layers.0.mixer.in_proj"]}
    assert found["mix at 50%"]["facts"] == {"budget": 7_420, "bytes": 5_270, "sum_of_kl": 0.1, "exact": True}
    assert found["mix at 10%"]["own"] == {}


def test_the_page_shows_every_row() -> None:
    row = {"kl": 0.6, "kl_se": 0.01, "top1": 0.9, "router_changed": 0.125}
    mix = {**row, "budget": 7_420, "bytes": 5_270, "sum_of_kl": 0.1, "exact": True}
    text = page(
        {
            "command": "python x.py",
            "environment": "a machine",
            "sensitivity": FOUND.to_json(),
            "cases": {"all, max": row, "mix at 50%": mix},
        }
    )
    assert "| all, max | 0.60000 | 0.01000 | 0.9000 | 12.50% |  |  |" in text
    assert "| mix at 50% | 0.60000 | 0.01000 | 0.9000 | 12.50% | 0.005 | 0.10000 |" in text
    assert "All NVFP4 0.004 MB, BF16 0.011 MB" in text
    lines = text.splitlines()
    assert lines.index("| 0.mamba.in_proj | nvfp4 | 0.50000 | 0.01000 | 0.9100 | 0.001 |") < lines.index(
        "| 1.experts | nvfp4 | 0.10000 | 0.00000 | 0.9800 | 0.006 |"
    )


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    return Given(tmp_path_factory.mktemp("study"))


def test_a_case_is_a_calibration_and_a_divergence(given: Given, tmp_path: Path) -> None:
    held_out = world.save_conversations(tmp_path / "held_out.jsonl", 8, seed=9)
    persona = Persona(given.recipe, given.base, given.adapter, given.train, held_out)
    own = {"bf16": [UP, DOWN], "fp8": ["backbone.layers.0.mixer.*"]}
    mixed = run_case(persona, {"preset": "mine", "own": own, "facts": {"bytes": 5}})
    plain = run_case(persona, {"preset": "all"})
    clipped = run_case(persona, {"preset": "all", "calibration": {"algorithm": "percentile", "percentile": 80.0}})
    calibrate(given.recipe, "all", given.base, given.adapter, given.train, tmp_path)
    state = tmp_path / "quant_state.safetensors"
    expected = measure(given.recipe, given.base, given.adapter, {"arm": (None, state)}, held_out)["arm"]
    assert expected.router is not None
    replies = expected.replies
    assert plain == {
        "kl": replies.kl, "kl_se": replies.kl_se, "top1": replies.top1, "router_changed": expected.router.changed
    }  # fmt: skip
    assert mixed["bytes"] == 5 and 0 < mixed["kl"] < plain["kl"] < clipped["kl"]
