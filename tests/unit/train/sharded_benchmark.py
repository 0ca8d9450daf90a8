"""`qat.train.bench.process` with FSDP2 on CPUs, for tests; see `sharded_process`."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.unit.train.sharded_process import shard_on_cpus

if __name__ == "__main__":
    from qat.train.bench.process import main

    shard_on_cpus()
    main(Path(sys.argv[1]))
