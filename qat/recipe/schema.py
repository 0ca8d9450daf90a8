"""The recipe: a tree of small frozen blocks that refuse unknown keys.

Every work function takes the block it needs. Values are strict (`"3"` is no integer, `true` is no number), lists arrive
as tuples, and what one block cannot see (does the gate name an arm that exists?) is checked on the whole by
`qat.recipe.checks`. The keys, their order and their meaning are fixed in `docs/architecture.md`, section 3.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from qat.recipe.checks import PRESETS, cross_faults

ALL_WEIGHTS_RATE = 1e-5
"""Peak learning rate with `trains: all` where the recipe gives none (Nemotron 3 Nano's in arXiv:2601.20088)."""

Family = Literal["nemotron_h", "qwen", "llama"]
Target = Literal["attention", "mamba", "routed_experts", "shared_experts", "mlp"]
Shipped = Literal["nvidia-nano", "conservative", "aggressive", "lightning", "all"]
Scheduler = Literal["cosine", "linear", "constant_with_warmup"]
ArmKind = Literal["base", "persona", "ptq", "distilled"]
Name = Annotated[str, Field(pattern=r"^[a-z0-9_]+$", max_length=64)]
Modules = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)]

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
LearningRate = Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]


class Block(BaseModel):
    """Common behaviour of all blocks: frozen, strict, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class BaseBlock(Block):
    """The BF16 checkpoint that everything starts from."""

    model: Annotated[str, Field(min_length=1)] = Field(
        default="tiny-base", description="`tiny-base` (embedded), a folder, or a hub id in the local cache."
    )
    revision: str | None = Field(default=None, description="Commit of the hub id; needs a hub id.")
    dtype: Literal["bfloat16"] = Field(
        default="bfloat16",
        description="Type of the base weights: merging rounds once to it and packing starts from it.",
    )
    trust_remote_code: Literal[False] = Field(
        default=False, description="Code from a checkpoint is never run; only `false`."
    )
    family: Family = Field(default="nemotron_h", description="Which module names and adapter targets apply.")
    chat_template: str | None = Field(
        default=None, description="Jinja file that replaces the checkpoint's own chat template."
    )


class DataBlock(Block):
    """Where the conversations come from and how they are split."""

    source: Annotated[str, Field(min_length=1)] = Field(
        default="generated",
        description="`generated` (grammars of this package, deterministic by seed), or a file or folder of "
        "conversations in any form that `qat data audit` reads.",
    )
    count: PositiveInt | None = Field(
        default=None, description="How many conversations to generate; null for a file or folder (all)."
    )
    seed: Seed = Field(default=11, description="Seed of the generator and of the split.")
    validation_fraction: Annotated[float, Field(gt=0.0, le=0.5)] = Field(
        default=0.1,
        description="Share held out per category for validation loss, validation KL and the divergence table.",
    )
    max_length: Annotated[int, Field(ge=32)] = Field(
        default=512, description="Longest conversation in tokens, system prompt included."
    )
    accept: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=(), description="Faults of the audit that do not stop the run: codes, or checks that replies may fail."
    )


class AdapterBlock(Block):
    """LoRA: which layers carry factors and how large these are."""

    rank: Annotated[int, Field(ge=1, le=512)] = Field(default=16, description="Rank of both factors.")
    alpha: Positive = Field(default=32.0, description="Scale numerator: W + alpha / rank * B A.")
    dropout: Fraction = Field(
        default=0.0, description="LoRA dropout; must be 0 with `routed_experts` and in distillation."
    )
    targets: Annotated[tuple[Target, ...], Field(min_length=1, strict=False)] = Field(
        default=("attention", "mamba", "routed_experts", "shared_experts"),
        description="Kinds of layers that carry factors.",
    )


class SftBlock(Block):
    """Supervised fine-tuning of the BF16 persona (loss on assistant turns only)."""

    epochs: PositiveInt = Field(default=3, description="Passes over the training conversations.")
    learning_rate: LearningRate = Field(
        default=1e-3, description="Peak learning rate; where it is left out with `trains: all`, 1e-5."
    )
    batch_size: PositiveInt = Field(default=8, description="Conversations per forward.")
    gradient_accumulation: PositiveInt = Field(default=1, description="Forwards per optimizer step.")
    warmup_ratio: Fraction = Field(default=0.05, description="Share of the steps in which the rate rises.")
    weight_decay: NonNegative = Field(default=0.0, description="AdamW weight decay.")
    max_grad_norm: Positive = Field(default=1.0, description="Gradient norm above which gradients are scaled down.")
    scheduler: Scheduler = Field(default="cosine", description="Course of the learning rate.")
    evals_per_epoch: PositiveInt = Field(default=2, description="Validations per epoch.")
    early_stopping_patience: Annotated[int, Field(ge=0)] = Field(
        default=3, description="Validations without a new best after which training stops; 0 never stops."
    )
    save_every: PositiveInt = Field(default=50, description="Optimizer steps between resumable checkpoints.")


class PromptsBlock(Block):
    """Fresh conversations of the generator to distil on: the teacher answers them, so more cost nothing."""

    count: PositiveInt = Field(description="Conversations generated, from the training half of the small world.")
    joined: PositiveInt = Field(
        default=1,
        description="Conversations under one system prompt in a row: more reply tokens a forward.",
    )
    validation: PositiveInt | None = Field(
        default=None,
        description="Further ones that choose the step; null: the validation conversations, which may be too few.",
    )


class RepliesBlock(Block):
    """Replies of the BF16 persona itself to learn on, beside those of the conversations."""

    count: PositiveInt | None = Field(
        default=None, description="Training conversations whose last reply the persona writes anew; all at most."
    )
    file: str | None = Field(
        default=None, description="Instead of `count`: JSONL of conversations whose replies it wrote on a server."
    )
    max_new_tokens: PositiveInt = Field(default=256, description="Longest reply in tokens.")
    temperature: NonNegative = Field(default=1.0, description="Of the replies' sampling; 0 is greedy.")
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = Field(default=1.0, description="Nucleus.")


class DistillBlock(Block):
    """Quantization-aware distillation: NVFP4 student, BF16 persona as teacher, forward KL."""

    max_steps: PositiveInt = Field(default=100, description="Optimizer steps.")
    learning_rate: LearningRate = Field(
        default=3e-4, description="Peak learning rate; where it is left out with `trains: all`, 1e-5."
    )
    batch_size: PositiveInt = Field(default=8, description="Rows per forward.")
    gradient_accumulation: PositiveInt = Field(default=1, description="Forwards per optimizer step.")
    warmup_ratio: Fraction = Field(default=0.05, description="Share of the steps in which the rate rises.")
    weight_decay: NonNegative = Field(default=0.0, description="AdamW weight decay.")
    max_grad_norm: Positive = Field(default=1.0, description="Gradient norm above which gradients are scaled down.")
    scheduler: Scheduler = Field(default="cosine", description="Course of the learning rate.")
    temperature: Positive = Field(default=1.0, description="Softens teacher and student alike.")
    tokens: Literal["all", "replies"] = Field(default="all", description="Positions whose KL counts.")
    ce_weight: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        default=0.0,
        description="Share of the cross entropy on what the conversations say: 0 distils, 1 is plain "
        "quantization-aware training, between them the losses are mixed.",
    )
    eval_every: PositiveInt = Field(
        default=25, description="Optimizer steps between validation KLs; the best one is kept."
    )
    save_every: PositiveInt = Field(default=25, description="Optimizer steps between resumable checkpoints.")
    prompts: PromptsBlock | None = Field(
        default=None, description="What to distil on; null: the training conversations."
    )
    replies: RepliesBlock | None = Field(default=None, description="Replies of the persona itself besides; null: none.")
    adapter: AdapterBlock | None = Field(default=None, description="Adapter of the student; null: as `train.adapter`.")


class TrainBlock(Block):
    """Both trainings and the adapter that they share."""

    trains: Literal["adapter", "all"] = Field(
        default="adapter",
        description="`adapter`: LoRA factors on a frozen base. `all`: every weight but the router (for small models).",
    )
    memory: Literal["bf16", "nvfp4"] = Field(
        default="bf16",
        description="How the frozen base is kept: `nvfp4` packs what all presets give four bits, and the persona then "
        "stands on the packed base; [training](training.md).",
    )
    allow: Annotated[tuple[Literal["memory", "thin_mask"], ...], Field(strict=False)] = Field(
        default=(),
        description="What would be refused and is wanted all the same: an estimate above the free memory, fewer than "
        "2 % of the tokens trained on.",
    )
    adapter: AdapterBlock = Field(default_factory=AdapterBlock)
    sft: SftBlock = Field(default_factory=SftBlock)
    distill: DistillBlock = Field(default_factory=DistillBlock)
    gradient_checkpointing: bool = Field(
        default=False,
        description="Compute every layer's tensors again in the backward instead of keeping them: same gradients, "
        "less memory, one forward more.",
    )

    @model_validator(mode="before")
    @classmethod
    def _gentle_with_all_weights(cls, block: object) -> object:
        """The published rate of full-weight distillation where none is given; those of factors would wreck weights."""
        if not isinstance(block, dict) or block.get("trains") != "all":
            return block
        stages = {name: block.get(name, {}) for name in ("sft", "distill")}
        given = {name: stage for name, stage in stages.items() if isinstance(stage, dict)}
        return {**block, **{name: {"learning_rate": ALL_WEIGHTS_RATE, **stage} for name, stage in given.items()}}

    @field_validator("memory", mode="before")
    @classmethod
    def _not_nf4(cls, memory: object) -> object:
        if memory == "nf4":
            raise PydanticCustomError(
                "nf4",
                "bitsandbytes packs linears only and would leave fused experts, 93 % of Nemotron-3-Nano, in BF16; "
                "`nvfp4` packs them, and into the format that is served",
            )
        return memory


class CalibrationBlock(Block):
    """Which conversations set the activation scales."""

    samples: PositiveInt = Field(default=64, description="Conversations, stratified by category and length.")
    batch_size: PositiveInt = Field(default=8, description="Conversations per forward.")
    algorithm: Literal["max", "mse", "percentile"] = Field(
        default="max", description="How amax follows from what was seen; [calibration](calibration.md)."
    )
    percentile: Annotated[float, Field(gt=0.0, le=100.0)] = Field(
        default=99.99, description="Of the activations' magnitudes, in percent; for `algorithm: percentile`."
    )


class PresetBlock(Block):
    """A precision preset of one's own: a shipped one with some modules stored otherwise."""

    like: Shipped = Field(default="all", description="The shipped preset that holds for all other modules.")
    bf16: Modules = Field(default=(), description="Modules that stay in BF16.")
    nvfp4: Modules = Field(default=(), description="Modules with NVFP4 weights and activations.")
    w4a16: Modules = Field(default=(), description="Modules with NVFP4 weights alone.")
    fp8: Modules = Field(default=(), description="Modules with FP8 weights and activations; no routed experts.")


class QuantBlock(Block):
    """What is packed to four bits and how the KV cache is kept."""

    format: Literal["nvfp4"] = Field(default="nvfp4", description="Number format of weights and activations.")
    kv_cache: Literal["bf16", "fp8"] = Field(default="bf16", description="Number format of the KV cache in NVFP4 arms.")
    calibration: CalibrationBlock = Field(default_factory=CalibrationBlock)
    presets: dict[Name, PresetBlock] = Field(
        default={}, description="Own precision presets by name, for `arms`; `qat sensitivity` writes them."
    )


class Arm(Block):
    """One checkpoint that is served and judged."""

    name: Name = Field(description="Row of the table, folder under export/, file under behavior/.")
    kind: ArmKind = Field(
        description="`base` as downloaded, `persona` in BF16, `ptq` plain NVFP4, `distilled` NVFP4 after distillation."
    )
    preset: str | None = Field(
        default=None,
        description=f"Precision preset of `ptq` and `distilled`: {', '.join(PRESETS)}, or one of `quant.presets`.",
    )


class ServeBlock(Block):
    """How vLLM serves an arm."""

    device: Literal["cpu", "cuda"] = Field(default="cpu", description="Where vLLM runs.")
    dtype: Literal["bfloat16", "float32"] = Field(default="bfloat16", description="Type of activations in vLLM.")
    max_model_len: Annotated[int, Field(ge=64)] = Field(
        default=768, description="Prompt and reply together, in tokens."
    )
    max_num_seqs: PositiveInt = Field(default=32, description="Sequences that vLLM decodes together.")
    kv_cache_gib: Positive = Field(default=1.0, description="Memory for the KV cache on CPU, in GiB.")
    tool_parser: Annotated[str, Field(min_length=1)] = Field(
        default="qwen3_coder", description="vLLM's `--tool-call-parser`."
    )
    port: Annotated[int, Field(ge=0, le=65535)] = Field(default=0, description="Port on 127.0.0.1; 0 takes a free one.")
    startup_timeout_s: Positive = Field(default=300.0, description="Longest wait for health, in seconds.")
    extra_args: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=(), description="Further arguments for vLLM."
    )


class Sampling(Block):
    """One pass over the suite per seed."""

    name: Name = Field(description="What the gate and the table call this pass.")
    temperature: NonNegative = Field(default=0.0, description="0 is greedy.")
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = Field(default=1.0, description="Nucleus.")
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1, strict=False)] = Field(
        default=(0,), description="One pass each."
    )
    limit: PositiveInt | None = Field(default=None, description="Only the first n cases; null: all.")


class GateBlock(Block):
    """What the candidate must show against the reference."""

    candidate: str = Field(description="Arm that is judged.")
    reference: str = Field(description="Arm that it must not fall behind.")
    sampling: str = Field(default="greedy", description="Pass that counts.")
    pass_floor: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        default=0.90, description="Least pass rate of the candidate."
    )
    max_drop: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        default=0.03, description="Largest fall against the reference."
    )
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = Field(
        default=0.95, description="Of every interval and decision."
    )


class BehaviorBlock(Block):
    """The suite, how it is sampled and the gate."""

    suite: Annotated[str, Field(min_length=1)] = Field(description="Name of a shipped suite or a YAML file.")
    max_tokens: PositiveInt = Field(default=96, description="Longest reply in tokens.")
    concurrency: PositiveInt = Field(default=16, description="Requests under way together.")
    sampling: Annotated[tuple[Sampling, ...], Field(min_length=1, strict=False)] = Field(
        default_factory=lambda: (Sampling(name="greedy"),), description="Passes over the suite."
    )
    divergence_cases: Annotated[int, Field(ge=0)] = Field(
        default=200,
        description="KL and top-1 agreement with the gate's reference: on its replies to the first n cases; "
        "0: not at all.",
    )
    gate: GateBlock


class Recipe(Block):
    """One run, from conversations to the verdict."""

    name: Name = Field(description="Also the default name of the run.")
    description: str = Field(default="", description="One sentence for `qat recipes list`.")
    seed: Seed = Field(default=7, description="Seed of training: initial factors and order of batches.")
    base: BaseBlock
    persona: Annotated[str, Field(min_length=1)] = Field(description="Name in data/personas or a YAML file.")
    data: DataBlock
    train: TrainBlock = Field(default_factory=TrainBlock)
    quant: QuantBlock = Field(default_factory=QuantBlock)
    arms: Annotated[tuple[Arm, ...], Field(min_length=1, strict=False)] = Field(description="Rows of the table.")
    serve: ServeBlock = Field(default_factory=ServeBlock)
    behavior: BehaviorBlock

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        faults = cross_faults(self)
        if faults:
            text = "; ".join(f"{fault.key_path}: {fault.problem}" for fault in faults)
            # In braces pydantic would look for context keys, so the text travels as one.
            raise PydanticCustomError("inconsistent", "{text}", {"text": text, "faults": faults})
        return self

    @property
    def distill_adapter(self) -> AdapterBlock:
        """The adapter of the distillation student."""
        return self.train.distill.adapter or self.train.adapter

    @property
    def presets(self) -> tuple[str, ...]:
        """Presets that need calibration, in the order of the arms."""
        return tuple(dict.fromkeys(arm.preset for arm in self.arms if arm.preset is not None))

    @property
    def distilled_presets(self) -> tuple[str, ...]:
        """Presets that need distillation, in the order of the arms."""
        presets = (arm.preset for arm in self.arms if arm.kind == "distilled")
        return tuple(dict.fromkeys(preset for preset in presets if preset is not None))

    @property
    def sha256(self) -> str:
        """Hash of the resolved recipe, independent of comments, order of keys and defaults left out."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def arm(self, name: str) -> Arm:
        """The arm of that name.

        Raises:
            KeyError: There is none.
        """
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise KeyError(name)

    def to_yaml(self) -> str:
        """The resolved recipe, every default written out; `load_recipe` of it gives an equal recipe."""
        import yaml

        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
