"""What an import that failed inside of PuLP keeps alive."""

from __future__ import annotations

import sys
import weakref
from types import SimpleNamespace

import pytest

from qat.quant.solvers import forget_failures


class _Network:
    pass


def _define_a_solver() -> type:
    class Solver:
        try:
            raise ImportError("no solver here")
        except ImportError as error:
            err = error

    return Solver


def _with_a_network(network: _Network) -> type:
    return _define_a_solver()


def test_the_frames_of_a_failed_set_up_go_and_its_message_stays() -> None:
    network = _Network()
    kept, library = weakref.ref(network), SimpleNamespace(Solver=_with_a_network(network), other=3)
    del network
    assert kept() is not None  # by the frame of _with_a_network
    forget_failures(library)
    assert kept() is None
    assert str(library.Solver.err) == "no solver here"


def test_what_modelopt_imported_holds_no_frames() -> None:
    import qat.quant.experts  # noqa: F401

    failed = [
        each.err for each in vars(sys.modules["pulp"]).values() if isinstance(getattr(each, "err", None), Exception)
    ]
    if not failed:
        pytest.skip("every solver of PuLP is installed")
    assert [error.__traceback__ for error in failed] == [None] * len(failed)
