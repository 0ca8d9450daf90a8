"""`qat.train.launch` with FSDP2 on CPUs, for tests.

accelerate shards on accelerators only and takes plain DDP on CPUs, although torch's FSDP2 runs there. Two things are
changed, in this process only: accelerate's state says FSDP with the plugin that the launcher's flags describe, and
gradients are summed and divided instead of averaged, which gloo cannot do.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch


def shard_on_cpus() -> None:
    """Make accelerate shard."""
    from accelerate import Accelerator, accelerator
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import FSDPModule

    initialize, prepare = Accelerator.__init__, accelerator.fsdp2_prepare_model

    def initialized(self: Any, *args: Any, **kwargs: Any) -> None:
        initialize(self, *args, **kwargs)
        self.state.distributed_type = DistributedType.FSDP
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin()

    def prepared(self: Any, model: torch.nn.Module) -> torch.nn.Module:
        model = prepare(self, model)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
        return model

    Accelerator.__init__ = initialized
    accelerator.fsdp2_prepare_model = prepared


if __name__ == "__main__":
    from qat.train.launch import main

    shard_on_cpus()
    sys.exit(main(Path(sys.argv[1])))
