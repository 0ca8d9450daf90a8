"""`save_pretrained` turns the model's `config.dtype` into a string."""

from __future__ import annotations

import contextlib
import functools
import io
import tempfile
from typing import Any

from qat.patches.protocol import Place, ProbeResult, Status
from qat.patches.registry import register


class TransformersDtypeString:
    """Gives `config.dtype` its value back after `save_pretrained`."""

    name = "transformers_dtype_string"
    title = "save_pretrained changes config.dtype from torch.bfloat16 to 'bfloat16' in place"
    breaks = "\"RuntimeError: Invalid device string: 'bfloat16'\" in code that passes config.dtype to torch afterwards"
    upstream = (
        "transformers/modeling_utils.py: PreTrainedModel.save_pretrained, config.dtype = str(dtype).split('.')[1]"
    )
    affects = "transformers 5.14 to 5.19"
    libraries = ("transformers",)
    place = Place.HERE
    repair = (
        "qat's wrapper puts config.dtype back after saving. Elsewhere set model.config.dtype = model.dtype after each "
        "save_pretrained."
    )

    def __init__(self) -> None:
        self._original: Any = None

    def probe(self) -> ProbeResult:
        """Save a tiny model and look at its configuration."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            dtype=torch.bfloat16,
        )
        with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
            model = LlamaForCausalLM(config)
            with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
                model.save_pretrained(folder)
        if isinstance(model.config.dtype, str):
            return ProbeResult(Status.NEEDED, f"config.dtype is the string {model.config.dtype!r} after saving")
        status = Status.APPLIED if self._original is not None else Status.NOT_NEEDED
        return ProbeResult(status, f"config.dtype is {model.config.dtype} after saving")

    def apply(self) -> None:
        """Wrap `PreTrainedModel.save_pretrained`."""
        if self._original is not None:
            return
        from transformers import PreTrainedModel

        original = self._original = PreTrainedModel.save_pretrained

        @functools.wraps(original)
        def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
            dtype = self.config.dtype
            try:
                return original(self, *args, **kwargs)
            finally:
                self.config.dtype = dtype

        PreTrainedModel.save_pretrained = save_pretrained

    def revert(self) -> None:
        """Take the wrapper off."""
        if self._original is None:
            return
        from transformers import PreTrainedModel

        PreTrainedModel.save_pretrained = self._original
        self._original = None


register(TransformersDtypeString())
