from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax as scipy_log_softmax

from qat.data.render import IGNORED
from qat.train import objective
from qat.train.objective import cross_entropy_sum, hidden_states, kl_sum, output_weight, position_scores
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
    targets = torch.arange(9)

    def run() -> list[torch.Tensor]:
        student, other = _states(0).requires_grad_(), _states(0).requires_grad_()
        loss = kl_sum(student, _states(1), _weight(), 1.5)
        entropy = cross_entropy_sum(other, _weight(), targets)
        (loss + entropy).backward()
        assert student.grad is not None and other.grad is not None
        return [loss.detach(), entropy.detach(), student.grad, other.grad]

    whole = run()
    monkeypatch.setattr(objective, "PIECE", piece)
    for left, right in zip(whole, run(), strict=True):
        torch.testing.assert_close(left, right)


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
