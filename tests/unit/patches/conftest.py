"""ModelOpt's registry of quantized modules is one for the process; some defects show only in ModelOpt as it comes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture
def plain_modelopt() -> Iterator[None]:
    """ModelOpt without this project's class for fused experts, whatever other tests have quantized before."""
    from modelopt.torch.quantization.nn import QuantModuleRegistry
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    from qat.quant.experts import QuantFusedExperts

    def ours() -> bool:
        registered: Any = QuantModuleRegistry.get(NemotronHExperts)
        return registered is not None and issubclass(registered, QuantFusedExperts)

    was_ours = ours()
    if was_ours:
        QuantModuleRegistry.unregister(NemotronHExperts)
    yield
    if was_ours:
        if QuantModuleRegistry.get(NemotronHExperts) is not None:
            QuantModuleRegistry.unregister(NemotronHExperts)
        QuantModuleRegistry.register({NemotronHExperts: "qat.NemotronHExperts"})(QuantFusedExperts)
