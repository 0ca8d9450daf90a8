from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def script() -> Callable[[str], ModuleType]:
    """A file of scripts/ as a module; scripts is no package."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"qat_script_{name}", ROOT / "scripts" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
