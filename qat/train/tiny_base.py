"""Pretraining of small Nemotron-H MoE bases from scratch, on generated text and on texts of one's own.

`tiny` is the embedded base of 4.4 M parameters, `small` one of 49 M for experiments that need a second size.

BF16 weights with FP32 master copies (what is trained is what is saved), AdamW, cosine schedule, and routing kept even
by the auxiliary-loss-free rule (Wang et al. 2024, arXiv:2408.15664): after each step the expert bias moves by a fixed
amount towards the underused experts. Resumable: a checkpoint holds masters, moments and the step; data order and
learning rate follow from the step alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing import Pool
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from qat.data.generate.corpus import documents
from qat.data.generate.tokenizer import VOCAB_SIZE, train_tokenizer
from qat.errors import UserError
from qat.patches.registry import ensure
from qat.train.base import PATCHES

IGNORED = -100


@dataclass(frozen=True)
class Pretraining:
    """Hyperparameters: batch in sequences, length in tokens, a key of `SHAPES`, how often own texts are repeated."""

    documents: int = 1_600_000
    corpus_seed: int = 1
    length: int = 512
    batch: int = 128
    steps: int = 3600
    learning_rate: float = 3e-3
    final_learning_rate: float = 3e-5
    warmup: int = 200
    weight_decay: float = 0.1
    balance_step: float = 1e-3
    seed: int = 0
    tokenizer_documents: int = 40_000
    shape: Literal["tiny", "small"] = "tiny"
    texts_copies: int = 1


def tiny_config(vocabulary: int = VOCAB_SIZE) -> Any:
    """4 Mamba-2, 4 MoE (8 routed non-gated relu² experts, 2 active, and a shared one) and 2 attention layers."""
    from transformers import NemotronHConfig

    return NemotronHConfig(
        hybrid_override_pattern="MEM*EMEM*E", vocab_size=vocabulary, hidden_size=192, num_attention_heads=6,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=2048, ssm_state_size=32, mamba_num_heads=12,
        mamba_head_dim=32, n_groups=2, conv_kernel=4, chunk_size=32, n_routed_experts=8, num_experts_per_tok=2,
        moe_intermediate_size=128, moe_shared_expert_intermediate_size=256, intermediate_size=128, n_shared_experts=1,
        routed_scaling_factor=2.5, norm_topk_prob=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        dtype="bfloat16", initializer_range=0.02,
    )  # fmt: skip


def small_config(vocabulary: int = VOCAB_SIZE) -> Any:
    """6 Mamba-2, 5 MoE (16 routed experts, 2 active, and a shared one) and 2 attention layers; 49 M at 8,192 pieces."""
    from transformers import NemotronHConfig

    return NemotronHConfig(
        hybrid_override_pattern="MEM*EMEMEM*EM", vocab_size=vocabulary, hidden_size=512, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=2048, ssm_state_size=64, mamba_num_heads=16,
        mamba_head_dim=64, n_groups=2, conv_kernel=4, chunk_size=64, n_routed_experts=16, num_experts_per_tok=2,
        moe_intermediate_size=320, moe_shared_expert_intermediate_size=512, intermediate_size=320, n_shared_experts=1,
        routed_scaling_factor=2.5, norm_topk_prob=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        dtype="bfloat16", initializer_range=0.02,
    )  # fmt: skip


SHAPES: dict[str, Callable[[int], Any]] = {"tiny": tiny_config, "small": small_config}


def _tokenize(job: tuple[str, int, int, int]) -> tuple[bytes, str]:
    folder, seed, start, stop = job
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    digest = hashlib.sha256()
    ids: list[int] = []
    ends: list[int] = []
    for text in documents(seed, start, stop):
        digest.update(text.encode())
        ids += tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        ends.append(len(ids))
    return np.asarray([len(ends), *ends, *ids], dtype=np.uint32).tobytes(), digest.hexdigest()


def build_corpus(settings: Pretraining, tokenizer_folder: Path, workers: int) -> tuple[np.ndarray, str]:
    """Generate, tokenize and pack the corpus.

    Returns:
        Rows of token ids, uint16 `(rows, length)`, each starting at a document's beginning and padded with 0; and the
        SHA-256 over the hashes of the text of all shards.
    """
    size = 5000
    jobs = [
        (str(tokenizer_folder), settings.corpus_seed, i, min(i + size, settings.documents))
        for i in range(0, settings.documents, size)
    ]
    rows: list[np.ndarray] = []
    digest = hashlib.sha256()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with Pool(workers) as pool:
        for blob, text_hash in pool.imap(_tokenize, jobs):
            digest.update(text_hash.encode())
            table = np.frombuffer(blob, dtype=np.uint32)
            count = int(table[0])
            ends, ids = table[1 : 1 + count], table[1 + count :].astype(np.uint16)
            rows.append(pack(ids, ends, settings.length))
    return np.concatenate(rows), digest.hexdigest()


def pack(ids: np.ndarray, ends: np.ndarray, length: int) -> np.ndarray:
    """Rows that start with a whole document; a document that does not fit is cut at the row's end."""
    rows: list[np.ndarray] = []
    row, filled, start = np.zeros(length, np.uint16), 0, 0
    for end in ends.tolist():
        part = ids[start:end][: length - filled]
        row[filled : filled + len(part)] = part
        filled += len(part)
        start = end
        if filled >= length - 24:
            rows.append(row)
            row, filled = np.zeros(length, np.uint16), 0
    return np.stack(rows)


class _Balance:
    """Counts the tokens of each expert in a forward and moves the routers' bias towards even use."""

    def __init__(self, model: torch.nn.Module, step: float) -> None:
        self._step = step
        self._counts: dict[Any, Tensor] = {}
        for module in model.modules():
            if type(module).__name__ == "NemotronHTopkRouter":
                module.register_forward_hook(self._count)

    def _count(self, router: Any, _inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        self._counts[router] = torch.bincount(output[2].reshape(-1), minlength=router.num_experts).float()

    def apply(self) -> None:
        """Move the biases."""
        for router, counts in self._counts.items():
            router.e_score_correction_bias += self._step * torch.sign(counts.mean() - counts)

    def worst(self) -> float:
        """The largest count of one expert over the even share, in the last forward."""
        return max(float((c / c.mean()).max()) for c in self._counts.values())


def learning_rate(step: int, settings: Pretraining) -> float:
    """Linear warm-up, then cosine to the final rate."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    part = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    low = settings.final_learning_rate
    return low + (settings.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, part)))


def _order(rows: int, settings: Pretraining) -> Iterator[np.ndarray]:
    """Row indices of every step's batch, epoch after epoch, by seed."""
    epoch = 0
    while True:
        order = np.random.default_rng((settings.seed, epoch)).permutation(rows)
        for start in range(0, rows - settings.batch + 1, settings.batch):
            yield order[start : start + settings.batch]
        epoch += 1


def pretrain(
    settings: Pretraining,
    work: Path,
    out: Path,
    *,
    device: str,
    workers: int,
    seconds: float,
    texts: Path | None = None,
    fit_seconds: float | None = None,
    say: Callable[[str], None] = print,
) -> bool:
    """Pretrain for at most `seconds`; returns whether the model is finished (then it lies in `out`).

    Call again with the same `work` to go on.

    Args:
        settings: Hyperparameters.
        work: Corpus and checkpoint.
        out: The finished model.
        device: Torch's name of it.
        workers: Processes that generate text.
        seconds: Of this call.
        texts: Folder of `qat.matrix.texts`: a tokenizer and rows of texts of one's own to read besides.
        fit_seconds: Instead of `settings.steps`: as many steps as this device does in so many seconds. The rate is
            measured first, so that the learning rate comes down in time whatever the device.
        say: Where to report.
    """
    if not device.startswith("cuda") and settings.steps > 50:
        raise UserError(
            "a base is pretrained on a GPU",
            where="--device",
            value=device,
            remedy="use cuda; on two cores it would take a day",
        )
    begun = time.monotonic()
    rows, corpus, tokenizer_folder = _corpus(settings, work, workers, texts, say)
    if fit_seconds is not None:
        settings = _fitted(settings, device, rows, corpus["vocabulary"], work / "steps.json", fit_seconds, say)
    trainer = _Trainer(settings, device, work / "state.safetensors", corpus["vocabulary"])
    batches = _order(len(rows), settings)
    for _ in range(trainer.step):
        next(batches)
    started, before = time.monotonic(), trainer.step
    while trainer.step < settings.steps:
        if time.monotonic() - begun > seconds:
            trainer.save()
            return False
        loss = trainer.train_step(_batch(rows, next(batches), device))
        if trainer.step % 200 == 0:
            spent = time.monotonic() - started
            rate = (trainer.step - before) * settings.batch * settings.length / spent
            say(
                f"step {trainer.step} loss {float(loss):.4f} lr {learning_rate(trainer.step, settings):.2e} "
                f"balance {trainer.balance.worst():.2f} {spent:.0f} s {rate:.0f} tokens/s"
            )
    trainer.save()
    _finish(trainer.model, tokenizer_folder, out, settings, corpus, float(loss))
    return True


def _fitted(
    settings: Pretraining,
    device: str,
    rows: np.ndarray,
    vocabulary: int,
    file: Path,
    seconds: float,
    say: Callable[[str], None],
) -> Pretraining:
    """The settings with as many steps as fit into the time, by a trial of 25 steps; measured once, kept in `file`."""
    if not file.exists():
        trainer = _Trainer(settings, device, file.with_suffix(".none"), vocabulary)
        batches = _order(len(rows), settings)

        def run(count: int) -> float:
            for _ in range(count):
                loss = trainer.train_step(_batch(rows, next(batches), device))
            return float(loss) * 0 + time.monotonic()  # reading the loss waits for the device

        started = run(5)  # kernels are compiled and chosen in these
        each = (run(20) - started) / 20
        file.write_text(json.dumps({"steps": max(1, int(seconds / each)), "seconds_a_step": round(each, 4)}))
        say(f"{each:.4f} s a step, {settings.batch * settings.length / each:.0f} tokens/s")
    return replace(settings, steps=int(json.loads(file.read_text())["steps"]))


def _corpus(
    settings: Pretraining, work: Path, workers: int, texts: Path | None, say: Callable[[str], None]
) -> tuple[np.ndarray, dict[str, Any], Path]:
    """Rows to read, what they are, and the tokenizer's folder; made once, kept in `work`."""
    from transformers import PreTrainedTokenizerFast

    begun = time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    tokenizer_folder = work / "tokenizer"
    if texts is not None:
        shutil.copytree(texts / "tokenizer", tokenizer_folder, dirs_exist_ok=True)
    elif not (tokenizer_folder / "tokenizer.json").exists():
        unread = documents(settings.corpus_seed + 1, 0, settings.tokenizer_documents)
        train_tokenizer(unread).save_pretrained(tokenizer_folder)
    rows_file, hash_file = work / "rows.npy", work / "corpus.json"
    if not hash_file.exists():
        rows, text_hash = build_corpus(settings, tokenizer_folder, workers)
        tokens = int((rows != 0).sum())
        made = {"documents": settings.documents, "rows": len(rows), "tokens": tokens, "sha256": text_hash}
        pieces = len(PreTrainedTokenizerFast.from_pretrained(tokenizer_folder))
        made["vocabulary"] = -(-pieces // 64) * 64  # rows of the embedding
        if texts is not None:
            own = np.load(texts / "train.npy")
            made["texts"] = {"rows": len(own), "tokens": int((own != 0).sum()), "copies": settings.texts_copies}
            rows = np.concatenate([rows, *[own] * settings.texts_copies])
        np.save(rows_file, rows)
        hash_file.write_text(json.dumps(made))
        say(f"corpus: {len(rows)} rows, {tokens / 1e6:.0f} M tokens, {time.monotonic() - begun:.0f} s")
    rows = np.load(rows_file, mmap_mode="r")
    return rows, json.loads(hash_file.read_text()), tokenizer_folder


def _batch(rows: np.ndarray, chosen: np.ndarray, device: str) -> Tensor:
    return torch.from_numpy(rows[np.sort(chosen)].astype(np.int64)).to(device)


class _Trainer:
    """Model, masters, optimizer; one step at a time."""

    def __init__(self, settings: Pretraining, device: str, state: Path, vocabulary: int = VOCAB_SIZE) -> None:
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM

        if device.startswith("cuda"):
            ensure(*PATCHES["nemotron_h"])
        self.settings, self.state, self.step = settings, state, 0
        torch.manual_seed(settings.seed)
        config = SHAPES[settings.shape](vocabulary)
        self.model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(device)
        self.model.config.use_cache = False
        for module in self.model.modules():
            if type(module).__name__ == "NemotronHTopkRouter":
                module.e_score_correction_bias = module.e_score_correction_bias.float()
        self.model.set_experts_implementation("grouped_mm")
        self.model.train()
        self.balance = _Balance(self.model, settings.balance_step)
        self._params = dict(self.model.named_parameters())
        self._masters = {n: p.detach().float().clone().requires_grad_() for n, p in self._params.items()}
        decay = [m for m in self._masters.values() if m.ndim >= 2]
        rest = [m for m in self._masters.values() if m.ndim < 2]
        groups = [{"params": decay, "weight_decay": settings.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device.startswith("cuda"))
        if state.exists():
            self._restore(load_file(str(state), device=device))

    def _restore(self, saved: dict[str, Tensor]) -> None:
        self.step = int(saved["step"])
        for name, master in self._masters.items():
            master.data.copy_(saved[f"master.{name}"])
            moments = {k: saved[f"{k}.{name}"] for k in ("exp_avg", "exp_avg_sq")}
            self._optimizer.state[master] = {"step": torch.tensor(float(self.step), device=master.device), **moments}
            self._params[name].data.copy_(master.data)
        for name, buffer in self.model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(saved[f"buffer.{name}"])

    def save(self) -> None:
        from safetensors.torch import save_file

        tensors = {"step": torch.tensor(self.step)}
        for name, master in self._masters.items():
            tensors[f"master.{name}"] = master.detach()
            for key in ("exp_avg", "exp_avg_sq"):
                tensors[f"{key}.{name}"] = self._optimizer.state[master][key]
        tensors |= {f"buffer.{n}": b for n, b in self.model.named_buffers() if n.endswith("e_score_correction_bias")}
        partial = self.state.with_suffix(".partial")
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, str(partial))
        os.replace(partial, self.state)

    def train_step(self, ids: Tensor) -> Tensor:
        """One optimizer step on `ids` (batch, length); returns the loss (nats a token)."""
        rate = learning_rate(self.step, self.settings)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        logits = self.model(input_ids=ids).logits[:, :-1].float()
        labels = ids[:, 1:].masked_fill(ids[:, 1:] == 0, IGNORED)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        loss.backward()
        for name, master in self._masters.items():
            grad = self._params[name].grad
            master.grad = None if grad is None else grad.float()
            self._params[name].grad = None
        torch.nn.utils.clip_grad_norm_(self._masters.values(), 1.0)
        self._optimizer.step()
        names = list(self._masters)
        torch._foreach_copy_([self._params[n].data for n in names], [self._masters[n].data for n in names])
        self.step += 1
        self.balance.apply()
        return loss.detach()


def _finish(
    model: Any, tokenizer_folder: Path, out: Path, settings: Pretraining, corpus: dict[str, Any], loss: float
) -> None:
    """Write the checkpoint as transformers does, with the tokenizer and how it was made."""
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    out.mkdir(parents=True, exist_ok=True)
    model.config.architectures = ["NemotronHForCausalLM"]
    model.config.use_cache = True
    model.generation_config = GenerationConfig(eos_token_id=[2], pad_token_id=0, bos_token_id=1)
    model.save_pretrained(out)
    PreTrainedTokenizerFast.from_pretrained(tokenizer_folder).save_pretrained(out)
    made = {"settings": vars(settings), "corpus": corpus, "final_loss": loss, "torch": torch.__version__}
    (out / "pretraining.json").write_text(json.dumps(made, indent=1))
