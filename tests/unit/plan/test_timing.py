"""The time model: hand values, factors that are known beforehand, and that no case judges itself."""

from __future__ import annotations

import pytest

from qat.errors import UserError
from qat.plan.gpus import GPUS, Gpu, find_gpu
from qat.plan.timing import (
    PRODUCTS,
    Factors,
    case_config,
    fit,
    leave_one_out,
    load_cases,
    measured_gpus,
    own_cases,
    samples_of,
    seconds,
    shipped_error,
    timed_cases,
)
from qat.plan.work import Work, read_network

UNIT = Gpu("unit", "", memory=1.0, bandwidth=100.0, flops=10.0 / PRODUCTS, source="")


def test_seconds_by_hand() -> None:
    factors = Factors(issue_block=0.5, issue_weight=0.25, making=2.0, activating=3.0)
    work = Work(flops=20.0, streamed=100.0, made=50.0, activations=200.0, block_passes=4, weight_passes=2)
    assert seconds(work, UNIT, factors) == pytest.approx(20 / 10 + (100 + 2 * 50 + 3 * 200) / 100)  # 10 s: working
    idle = work._replace(flops=0.0, streamed=0.0, made=0.0, activations=0.0)
    assert seconds(idle, UNIT, factors) == pytest.approx(4 * 0.5 + 2 * 0.25)  # issuing sets the pace


def test_fit_finds_the_factors_that_made_the_samples() -> None:
    known = Factors(3e-3, 1e-3, 2.0, 12.0)
    gpu = GPUS["h200"]
    works = [work for work, _, _ in samples_of(timed_cases())]
    found = fit([(work, gpu, seconds(work, gpu, known)) for work in works])
    assert found == pytest.approx(known, rel=1e-3)


def test_a_case_has_no_say_in_its_own_estimate() -> None:
    cases = timed_cases()
    changed = [cases[0]._replace(seconds=100 * cases[0].seconds), *cases[1:]]
    assert leave_one_out(changed)[0].seconds == leave_one_out(cases)[0].seconds
    assert leave_one_out(changed)[1].seconds != leave_one_out(cases)[1].seconds


def test_every_measured_case_is_estimated_by_the_others() -> None:
    """What docs/planning.md says of the steps that are measured so far."""
    for error in leave_one_out(timed_cases()):
        assert abs(error.relative) < (0.125 if error.case.way == "qat" else 0.25), error.case
    assert shipped_error() < 0.125 and len(own_cases()) >= 9


def test_a_packed_base_has_no_say_in_the_time_model() -> None:
    packed = [case for case in own_cases() if case.memory == "nvfp4"]
    assert len(packed) == 2 and not set(packed) & set(timed_cases())
    assert sum(measured_gpus().values()) == len(own_cases()) - 2


def test_measured_cases_are_of_known_models_and_gpus() -> None:
    for case in load_cases():
        assert case.gpu in GPUS and case.source and case.seconds > 0
        layers = len(read_network(case_config(case)).layers)
        assert layers == (case.layers or 52)


def test_gpus_are_found_by_what_people_write() -> None:
    assert find_gpu("H200").name == "h200" and find_gpu("DGX Spark").name == "dgx-spark"
    with pytest.raises(UserError, match="no such GPU") as fault:
        find_gpu("h20")
    assert "h200" in fault.value.remedy


def test_twice_the_bandwidth_halves_what_moves() -> None:
    factors = Factors(0.0, 0.0, 1.0, 1.0)
    work = Work(0.0, 1e9, 1e9, 1e9, 1, 0)
    fast = UNIT._replace(bandwidth=200.0)
    assert seconds(work, fast, factors) == pytest.approx(seconds(work, UNIT, factors) / 2)
