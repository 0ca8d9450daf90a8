"""ModelOpt's import, without the frames that it would keep alive.

ModelOpt imports PuLP for its search. PuLP keeps what its interfaces to COPT and CPLEX raised when they found no solver,
and the tracebacks of these exceptions hold every frame that waited for that first import, up to the program's own, with
all their variables: a network among them is never freed.
"""

from __future__ import annotations

import importlib

import modelopt.torch.opt.searcher  # noqa: F401  the part of ModelOpt that searches


def forget_failures(module: object) -> None:
    """Take the tracebacks from the exceptions that the classes of a module keep as `err`.

    Args:
        module: PuLP.
    """
    for kept in (getattr(each, "err", None) for each in list(vars(module).values()) if isinstance(each, type)):
        if isinstance(kept, BaseException):
            kept.__traceback__ = None


forget_failures(importlib.import_module("pulp"))
