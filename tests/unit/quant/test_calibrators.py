"""Each calibrator against a slow definition: sorting, and trying every range one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qat.errors import UserError
from qat.quant import nvfp4
from qat.quant.calibrators import ActivationMse, Percentile, PerExpertMax, WeightMse
from qat.quant.modelopt import calibrate, insert_quantizers, quantizers
from tests.tiny_models import nemotron_h_tiny, token_ids


def batches(count: int = 3, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [(torch.randn(20, 64, generator=generator) * scale * (1 + part)).bfloat16() for part in range(count)]


@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.0, 99.9])
def test_percentile_by_sorting(percentile: float) -> None:
    calibrator = Percentile(percentile)
    assert calibrator.compute_amax() is None
    # In float32: bfloat16 magnitudes lie in lumps wider than a bin.
    data = [part * torch.linspace(1, 1.01, part.numel()).view(part.shape) for part in batches()]
    for batch in data:
        calibrator.collect(batch)
    amax = calibrator.compute_amax()
    assert amax is not None and amax.dtype == torch.float32 and amax.shape == ()
    magnitudes = torch.cat([batch.float().abs().flatten() for batch in data]).sort().values
    exact = float(magnitudes[int(len(magnitudes) * percentile / 100)])
    width = float(data[0].float().abs().max()) / 2048
    # The lower edge of the bin, and the next larger magnitude may lie in the next one.
    assert exact - 3 * width <= float(amax) <= exact + 3 * width


def test_the_hundredth_percentile_is_the_maximum() -> None:
    calibrator = Percentile(100.0)
    calibrator.collect(batches(1)[0])
    amax = calibrator.compute_amax()
    assert amax is not None
    assert float(amax) == pytest.approx(float(batches(1)[0].float().abs().max()), rel=1e-3)


def squared_error(x: Tensor, function: object, amax: Tensor) -> float:
    return float(((function(x.float(), amax) - x.float()).double() ** 2).sum())  # type: ignore[operator]


def test_weight_range_by_trying_all() -> None:
    w = batches(1)[0]
    maximum = w.abs().max().float()
    calibrator = WeightMse(maximum, nvfp4.fake_quant_weight)
    calibrator.collect(w)
    calibrator.collect(w * 100)  # a second forward sees the same weight, and is not counted
    found = calibrator.compute_amax()
    tried = {float(maximum) * (1 + step / 32): 0.0 for step in range(32)}
    errors = {amax: squared_error(w, nvfp4.fake_quant_weight, torch.tensor(amax)) for amax in tried}
    best = min(errors, key=errors.__getitem__)
    assert float(found) == pytest.approx(best, rel=1e-6)
    assert maximum <= found < 2 * maximum
    assert errors[best] <= squared_error(w, nvfp4.fake_quant_weight, maximum)


def test_twice_the_range_is_the_same_grid() -> None:
    """Why one octave is a whole search."""
    w = batches(1)[0]
    maximum = w.abs().max().float()
    assert torch.equal(nvfp4.fake_quant_weight(w, maximum * 1.25), nvfp4.fake_quant_weight(w, maximum * 2.5))


def test_every_expert_has_its_own_search() -> None:
    w = torch.stack([batch[:16] for batch in batches(3)])
    maxima = PerExpertMax((2, 1), None, False)
    maxima.collect(w)
    amax = maxima.compute_amax().float()
    assert torch.equal(amax, w.abs().amax(dim=(1, 2)).float())
    together = WeightMse(amax, nvfp4.fake_quant_weight)
    together.collect(w)
    for expert in range(3):
        alone = WeightMse(amax[expert], nvfp4.fake_quant_weight)
        alone.collect(w[expert])
        assert together.compute_amax()[expert] == alone.compute_amax()


def test_activation_range_over_all_batches() -> None:
    data = batches()
    maximum = torch.stack([batch.abs().max() for batch in data]).max().float()
    calibrator = ActivationMse(maximum, nvfp4.fake_quant_activation)
    for batch in data:
        calibrator.collect(batch)
    tried = [float(maximum) * (0.25 + step / 16) for step in range(29)]
    errors = {
        amax: sum(squared_error(batch, nvfp4.fake_quant_activation, torch.tensor(amax)) for batch in data)
        for amax in tried
    }
    assert float(calibrator.compute_amax()) == pytest.approx(min(errors, key=errors.__getitem__), rel=1e-6)


def ranges(algorithm: str, preset: str = "all") -> dict[str, tuple[Tensor, Tensor | None]]:
    model = nemotron_h_tiny()
    insert_quantizers(model, preset, model.config.to_dict())

    def read(network: nn.Module) -> None:
        for seed in (1, 2):
            network(input_ids=token_ids(seed=seed))

    calibrate(model, read, algorithm=algorithm, percentile=99.0)
    return {
        name: (pair.weight._amax, pair.input._amax if "input" in pair.used() else None)
        for name, pair in quantizers(model).items()
    }


def test_algorithms_in_a_network() -> None:
    by_max, by_mse, by_percentile = (ranges(name) for name in ("max", "mse", "percentile"))
    assert by_max.keys() == by_mse.keys() == by_percentile.keys()
    for name, (weight, entry) in by_max.items():
        assert entry is not None
        mse_weight, mse_entry = by_mse[name]
        # Never clipped: `qat.train.ranges` would raise the range again after the first step.
        assert bool((mse_weight >= weight).all()) and bool((mse_weight < 2 * weight).all())
        assert mse_entry is not None and 0.25 * entry <= mse_entry <= 2 * entry
        percentile_weight, percentile_entry = by_percentile[name]
        assert torch.equal(percentile_weight, weight)
        assert percentile_entry is not None and percentile_entry < entry
        assert mse_weight.dtype == percentile_entry.dtype == torch.float32
    assert any(not torch.equal(by_mse[name][0], by_max[name][0]) for name in by_max)
    assert any(not torch.equal(by_mse[name][1], by_max[name][1]) for name in by_max)  # type: ignore[arg-type]


def test_formats_without_activations_calibrate_weights_alone() -> None:
    found = ranges("mse", "lightning")
    kinds = {name.rpartition(".")[2]: entry is None for name, (_, entry) in found.items()}
    assert kinds == {"in_proj": False, "out_proj": False, "up_proj": True, "down_proj": True}


def test_an_unknown_algorithm() -> None:
    model = nemotron_h_tiny()
    insert_quantizers(model, "all", model.config.to_dict())
    with pytest.raises(UserError, match="algorithm"):
        calibrate(model, lambda network: None, algorithm="entropy")
