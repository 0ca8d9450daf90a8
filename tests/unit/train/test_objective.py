from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax as scipy_log_softmax
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qat.data.render import IGNORED
from qat.train import objective
from qat.train.objective import (
    cross_entropy_sum,
    hidden_states,
    kl_sum,
    mixed_sum,
    output_weight,
    position_scores,
)
from tests.tiny_models import nemotron_h_tiny, token_ids


def _states(seed: int, positions: int = 9, hidden: int = 16) -> torch.Tensor:
    return torch.randn(positions, hidden, generator=torch.Generator().manual_seed(seed))


def _weight() -> torch.Tensor:
    return torch.randn(50, 16, generator=torch.Generator().manual_seed(9))


def _slow_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> np.ndarray:
    """The definition, position by position, in float64 with scipy's softmax."""
    weight = _weight().double().numpy()
    log_q = scipy_log_softmax(student.double().numpy() @ weight.T / temperature, axis=-1)
    log_p = scipy_log_softmax(teacher.double().numpy() @ weight.T / temperature, axis=-1)
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kl_is_teacher_against_student(temperature: float) -> None:
    student, teacher = _states(0), _states(1)
    expected = _slow_kl(student, teacher, temperature).sum() * temperature**2
    assert float(kl_sum(student, teacher, _weight(), temperature)) == pytest.approx(expected, rel=1e-5)
    backwards = _slow_kl(teacher, student, temperature).sum() * temperature**2
    assert abs(expected - backwards) > 0.01 * expected


def test_kl_of_equals_is_exactly_zero() -> None:
    states = _states(0)
    assert float(kl_sum(states, states.clone(), _weight(), 1.0)) == 0.0
    scores = position_scores(states, states.clone(), _weight())
    assert not scores.kl.any() and scores.agree.all()


def test_position_scores() -> None:
    student, teacher = _states(0), _states(1)
    scores = position_scores(student, teacher, _weight())
    np.testing.assert_allclose(scores.kl.numpy(), _slow_kl(student, teacher, 1.0), rtol=1e-4)
    best = [(states @ _weight().T).argmax(dim=-1) for states in (student, teacher)]
    assert scores.agree.tolist() == (best[0] == best[1]).tolist()


@pytest.mark.parametrize("piece", [50, 150, 400])
def test_pieces_change_neither_value_nor_gradient(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """Also where the output layer is trained: its gradient is summed over the pieces."""
    targets = torch.arange(9)

    def run() -> list[torch.Tensor]:
        weight, leaves = _weight().requires_grad_(), [_states(0).requires_grad_() for _ in range(3)]
        losses = [
            kl_sum(leaves[0], _states(1), weight, 1.5),
            cross_entropy_sum(leaves[1], weight, targets),
            mixed_sum(leaves[2], _states(1), weight, targets, 1.5, 0.3),
        ]
        (torch.stack(losses).sum() / 7).backward()
        gradients = [leaf.grad for leaf in (*leaves, weight)]
        assert all(gradient is not None for gradient in gradients)
        return [*(loss.detach() for loss in losses), *(gradient for gradient in gradients if gradient is not None)]

    whole = run()
    monkeypatch.setattr(objective, "PIECE", piece)
    for left, right in zip(whole, run(), strict=True):
        torch.testing.assert_close(left, right)
    with torch.no_grad():
        torch.testing.assert_close(kl_sum(_states(0), _states(1), _weight(), 1.5), whole[0])


@pytest.mark.parametrize("ce_weight", [0.0, 0.25, 1.0])
def test_a_mix_is_the_weighted_sum_of_its_losses(ce_weight: float) -> None:
    student, teacher, targets = _states(0), _states(1), torch.arange(9)
    log_q = scipy_log_softmax(student.double().numpy() @ _weight().double().numpy().T, axis=-1)
    entropy = -sum(log_q[position, position] for position in range(9))
    expected = (1 - ce_weight) * _slow_kl(student, teacher, 2.0).sum() * 4 + ce_weight * entropy
    found = mixed_sum(student, teacher, _weight(), targets, 2.0, ce_weight)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_the_teacher_s_answer_is_no_way_to_train_the_output_layer() -> None:
    weight = _weight().requires_grad_()
    kl_sum(_states(0), _states(1), weight, 1.0).backward()
    found, own = weight.grad, _weight().requires_grad_()
    log_p = torch.log_softmax(_states(1) @ _weight().T, dim=-1)
    (log_p.exp() * (log_p - torch.log_softmax(_states(0) @ own.T, dim=-1))).sum().backward()
    torch.testing.assert_close(found, own.grad)


class _Live(TorchDispatchMode):
    """The largest sum of bytes of tensors that were made inside and alive at once, by the lifetimes of storages."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.known:
                    self.known.add(key)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, key, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return made

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize(("loss", "most"), [("entropy", 18), ("kl", 34)])
def test_logits_of_all_positions_never_exist(monkeypatch: pytest.MonkeyPatch, loss: str, most: int) -> None:
    """Peak of forward and backward: what the memory estimate counts a number of a piece, and far below all logits."""
    vocabulary, hidden, positions, pieces = 4096, 16, 256, 16
    monkeypatch.setattr(objective, "PIECE", vocabulary * positions // pieces)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocabulary, hidden, generator=generator).bfloat16()
    student = torch.randn(positions, hidden, generator=generator).bfloat16().requires_grad_()
    teacher = torch.randn(positions, hidden, generator=generator).bfloat16()
    targets = torch.randint(0, vocabulary, (positions,), generator=generator)
    with _Live() as live:
        if loss == "kl":
            kl_sum(student, teacher, weight, 1.0).backward()
        else:
            cross_entropy_sum(student, weight, targets).backward()
    numbers = vocabulary * positions // pieces
    assert numbers * 4 < live.peak <= most * numbers + 8 * positions * hidden
    assert live.peak < 3 * vocabulary * positions


def test_cross_entropy_is_the_models_own_loss() -> None:
    """Transformers' own labels argument is the oracle: it shifts, ignores -100 and averages."""
    model = nemotron_h_tiny(dtype=torch.float32)
    ids = token_ids(2, 24)
    labels = ids.clone()
    labels[:, :10] = IGNORED
    targets = torch.full_like(ids, IGNORED)
    targets[:, :-1] = labels[:, 1:]
    with torch.no_grad():
        expected = float(model(input_ids=ids, labels=labels).loss)
        total = cross_entropy_sum(hidden_states(model, ids, targets), output_weight(model), targets[targets != IGNORED])
    assert float(total) / int((targets != IGNORED).sum()) == pytest.approx(expected, rel=1e-5)


def test_an_output_layer_with_more_than_a_product_is_refused() -> None:
    model = nemotron_h_tiny()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(512))
    with pytest.raises(RuntimeError, match="plain product"):
        output_weight(model)
