"""Transformers' Nemotron-H bounds the time step from below where the checkpoint and vLLM do not."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from qat.patches.protocol import Place, ProbeResult, Status
from qat.patches.registry import register
from qat.patches.replacing import Around, ReplacingPatch
from qat.patches.tiny import nemotron_h_config

# softplus(-30) = 9e-14: a step at which a layer without its skip connection D has nothing to say.
_NO_STEP = -30.0


class NemotronHTimeStepLimit(ReplacingPatch):
    """Gives the mixer `config.time_step_limit`, (0, inf) in every published checkpoint.

    The step dt = softplus(x + dt_bias) of each head decides how much of a token enters the state. Transformers clamps
    it to (`time_step_min`, inf) = (0.001, inf) in the chunked scan, that is in training and prefill, and not at all in
    the recurrence that decodes token by token, so it also disagrees with itself. `time_step_min` is what dt_bias is
    initialized with, no bound of the model; the hub's code and Transformers 5.14 use `time_step_limit` in their CUDA
    path and `time_step_min` in the other. vLLM takes (0, inf) whatever the configuration says.

    Measured in float32 on random four-layer models (one Mamba layer, convolution of unit variance, 8 x 120 tokens, all
    512 log probabilities of each position), Transformers 5.19 against vLLM 0.32 on a CPU:

    ==============================  ============  ==================  ======================
    dt_bias                         dt < 0.001    unpatched           patched
    ==============================  ============  ==================  ======================
    softplus in 0.001 … 0.1, D = 1  32 %          0.022, top-1 95.6%  2.8e-7, top-1 100 %
    softplus in 0.001 … 0.1, D = 0  32 %          0.095, top-1 82.0%  3.5e-7, top-1 100 %
    -10 … -8, D = 0                 100 %         0.53, top-1 17.9%   3.5e-7, top-1 100 %
    ==============================  ============  ==================  ======================

    (mean absolute difference of the log probabilities; rounding to bfloat16 alone costs 0.02 on such models). Of the
    steps of the trained `tiny_base` 8 % are below 0.001 on 85 tokens of English; there the bound changes the log
    probabilities by 0.0035 and no top-1.
    """

    name = "nemotron_h_time_step_limit"
    title = "Nemotron-H trains with time steps of at least time_step_min, and is served without that bound"
    breaks = (
        "Silent: logits of training and prefill differ from vLLM's, and from Transformers' own decoding, wherever "
        "softplus(dt + dt_bias) < 0.001 (mean difference of log probabilities 0.02 to 0.5 on random models, 3e-7 with "
        "the patch), and no gradient reaches dt_bias and in_proj there."
    )
    upstream = "transformers/models/nemotron_h/modeling_nemotron_h.py: NemotronHMamba2Mixer.__init__, time_step_limit"
    affects = "transformers 5.17 to 5.19; before that, and in the hub's code, without mamba_ssm only"
    libraries = ("transformers",)
    place = Place.HERE
    repair = (
        "Mixers built afterwards use config.time_step_limit. With other tools: after loading, set "
        "module.time_step_limit = tuple(config.time_step_limit) on every NemotronHMamba2Mixer. A limit other than "
        "(0, inf) cannot be served by vLLM, which ignores the field."
    )

    def probe(self) -> ProbeResult:
        """Compare a layer's answer at a time step of almost nothing with its answer at `time_step_min`."""
        import torch
        from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

        config = nemotron_h_config("linear_attention")
        at_minimum = math.log(math.expm1(config.time_step_min))
        answers = []
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            mixer = NemotronHMamba2Mixer(config, layer_idx=0).eval()
            mixer.A_log.zero_()
            mixer.D.zero_()
            inputs = torch.rand(1, 16, config.hidden_size)
            for bias in (_NO_STEP, at_minimum):
                mixer.in_proj.weight[-config.mamba_num_heads :].zero_()
                mixer.dt_bias.fill_(bias)
                answers.append(mixer(inputs).abs().max().item())
        ratio = answers[0] / answers[1]
        detail = f"a layer's answer at dt = 9e-14 is {ratio:.2g} times that at dt = {config.time_step_min:g}"
        return ProbeResult(Status.NEEDED, detail) if ratio > 0.5 else self.absent(detail)

    def replacements(self) -> Iterable[tuple[object, str, Around]]:
        """Correct each mixer as it is built."""
        from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

        yield NemotronHMamba2Mixer, "__init__", _build


def _build(original: Around, mixer: Any, config: Any, *args: Any, **kwargs: Any) -> None:
    original(mixer, config, *args, **kwargs)
    mixer.time_step_limit = tuple(config.time_step_limit)


register(NemotronHTimeStepLimit())
