"""Jobs that a spawned process can import."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

from qat.matrix.jobs import Job, Place


@dataclass(frozen=True)
class Sleeper(Job):
    """Sleeps, fails or ends its process."""

    seconds: float = 0.0
    fault: str = ""

    def run(self, place: Place) -> dict[str, Any]:
        begun = time.time()
        time.sleep(self.seconds)
        if self.fault == "raise":
            raise ValueError("no such luck")
        if self.fault == "die":
            os._exit(9)
        return {"begun": begun, "ended": time.time(), "gpu": os.environ["CUDA_VISIBLE_DEVICES"]}
