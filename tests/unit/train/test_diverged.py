from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from qat.train.diverged import exploded, first_fault, first_output, largest_gradient


@pytest.mark.parametrize(
    ("norm", "past", "max_norm", "expected"),
    [
        (2001.0, [1.0, 2.0, 3.0, 2.0, 2.0], 1.0, True),  # median 2
        (1999.0, [1.0, 2.0, 3.0, 2.0, 2.0], 1.0, False),
        (1e9, [1.0, 1.0, 1.0, 1.0], 1.0, False),  # four steps decide nothing
        (50.0, [1e-3] * 20, 1.0, False),  # far above the median, not above what clipping copes with
        (50.0, [1e-3] * 20, 0.4, True),
        (5e3, [10.0] * 100 + [1.0] * 20, 1.0, True),  # only the last twenty count
        (5e3, [1.0] * 100 + [10.0] * 20, 1.0, False),
    ],
)
def test_rule_of_an_explosion(norm: float, past: list[float], max_norm: float, expected: bool) -> None:
    assert exploded(norm, past, max_norm) is expected


class _Wrecked(nn.Module):
    """Adds what is not finite, in the forward or, as 0 * inf, in the backward only."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "output":
            return x + float("inf")
        if self.where == "gradient":
            return x + (x.detach() - x).abs().sqrt()  # sqrt has an infinite slope at 0
        return x


def _network(where: str) -> nn.Sequential:
    torch.manual_seed(0)
    layers = {
        "first": nn.Linear(4, 4),
        "second": nn.Sequential(nn.Linear(4, 4), _Wrecked(where)),
        "third": nn.Linear(4, 1),
    }
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model


def _pass(model: nn.Module, factor: float = 1.0) -> Callable[[], Tensor]:
    rows = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    return partial(lambda: model(rows).sum() * factor)


def test_the_innermost_first_output_is_named() -> None:
    model = _network("output")
    assert "the output of second.1 " in first_fault(model, [_pass(model)])


def test_the_batch_that_breaks_may_be_a_later_one() -> None:
    sound, wrecked = _network(""), _network("output")
    wrecked.load_state_dict(sound.state_dict())
    assert "the output of second.1 " in first_fault(wrecked, [_pass(sound), _pass(wrecked)])


def test_a_loss_that_breaks_by_itself() -> None:
    model = _network("")
    assert "the loss is not finite" in first_fault(model, [_pass(model, float("nan"))])


def test_the_gradient_nearest_to_the_output_is_named() -> None:
    """Backward goes third, second, first: the slope breaks before second.0, so its bias is the first parameter hit."""
    model = _network("gradient")
    assert "the gradient of second.0.bias is the first" in first_fault(model, [_pass(model)])


def test_a_parameter_that_was_broken_before() -> None:
    model = _network("output")
    with torch.no_grad():
        model.get_parameter("first.weight")[0, 0] = float("nan")
    assert "parameter first.weight was not finite before" in first_fault(model, [_pass(model)])


def test_nothing_found_says_so_and_leaves_no_hook() -> None:
    model = _network("")
    assert "a second run of the same step was finite" in first_fault(model, [_pass(model)])
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_largest_gradient() -> None:
    model = _network("")
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, [1.0, 1.0, 2.0, 1.0, 1.0, 1.0][number])
    assert largest_gradient(model) == "the gradient of second.0.weight is the largest"


def test_the_first_output_of_a_validation() -> None:
    model = _network("output").eval()
    assert "the output of second.1 " in first_output(model, _pass(model))
    sound = _network("").eval()
    assert "every layer's output is finite" in first_output(sound, _pass(sound, float("nan")))
    assert not any(module._forward_hooks for module in model.modules())
