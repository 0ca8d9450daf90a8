"""What every test stands on: two torch threads, no model hub, heeded interrupts, and the folder of real files."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

# Before torch or tokenizers are imported: the bytes of a training run depend on the number of threads, and no test
# may reach for the network.
os.environ["OMP_NUM_THREADS"] = "2"
os.environ["MKL_NUM_THREADS"] = "2"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
# A shell starts background jobs with SIGINT ignored; processes that a test starts and interrupts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real templates, configurations and conversations (environment variable QAT_REAL_DATA)."""
    named = os.environ.get("QAT_REAL_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "real"
    if not folder.is_dir():
        pytest.skip(f"no folder of real files at {folder}; set QAT_REAL_DATA")
    return folder
