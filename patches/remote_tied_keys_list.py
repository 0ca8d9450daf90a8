"""Remote code of before Transformers 5 declares its tied weights as a list."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qat.patches.protocol import Place, ProbeResult, Status
from qat.patches.registry import register
from qat.patches.replacing import Around, ReplacingPatch
from qat.patches.tiny import scratch, tensor_names


class RemoteTiedKeysList(ReplacingPatch):
    """Reads `_tied_weights_keys = ["lm_head.weight"]` as the mapping it stands for.

    A list says which weights are tied; that they are tied to the input embedding went without saying. The repair that
    circulates, `{k: k}`, stops the error and ties `lm_head` to itself: with `tie_word_embeddings` the head is then a
    random matrix of its own after construction, and stays on the meta device (missing) after loading a checkpoint
    that rightly holds only the embedding.
    """

    name = "remote_tied_keys_list"
    title = "save_pretrained fails on remote code whose _tied_weights_keys is a list"
    breaks = (
        "\"AttributeError: 'list' object has no attribute 'keys'\" in save_pretrained, export_hf_checkpoint and, with "
        "tie_word_embeddings, in the constructor."
    )
    upstream = "huggingface/transformers#44861; NVIDIA/Model-Optimizer#2071; unslothai/unsloth#6540"
    affects = "transformers >=5.0, 5.19 seen, with remote code such as Nemotron-H's modeling_nemotron_h.py"
    libraries = ("transformers",)
    place = Place.HERE
    repair = (
        "Each name of the list is mapped to the model's input embedding, which is what it is tied to. With other "
        "tools: set _tied_weights_keys = {'lm_head.weight': '<name of the embedding>.weight'} on the class before the "
        "model is built, and look whether lm_head.weight is among the saved tensors of an untied model."
    )

    def probe(self) -> ProbeResult:
        """Build and save a class with such a list, tied and untied, and look for `lm_head.weight` in the file."""
        from transformers import LlamaConfig, LlamaForCausalLM

        class Remote(LlamaForCausalLM):
            _tied_weights_keys = ["lm_head.weight"]

        for tied in (False, True):
            config = LlamaConfig(
                vocab_size=8,
                hidden_size=8,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=1,
                tie_word_embeddings=tied,
            )
            with scratch() as folder:
                try:
                    model = Remote(config)
                    model.save_pretrained(folder)
                except AttributeError as error:
                    return ProbeResult(Status.NEEDED, f"{error} ({'tied' if tied else 'untied'} head)")
                written = "lm_head.weight" in tensor_names(folder)
                one_tensor = model.lm_head.weight is model.get_input_embeddings().weight
            if written is tied or one_tensor is not tied:
                detail = f"tie_word_embeddings={tied}: written {written}, one tensor with the embedding {one_tensor}"
                return ProbeResult(Status.NEEDED, f"lm_head, {detail}")
        return self.absent("an untied lm_head is written, a tied one is the embedding and is not")

    def replacements(self) -> Iterable[tuple[object, str, Around]]:
        """Give every reader of `_tied_weights_keys` a mapping."""
        from transformers import PreTrainedModel, modeling_utils

        yield PreTrainedModel, "get_expanded_tied_weights_keys", _expand
        yield modeling_utils, "_get_tied_weight_keys", _collect


def _expand(original: Around, model: Any, *args: Any, **kwargs: Any) -> Any:
    _make_mapping(model)
    return original(model, *args, **kwargs)


def _collect(original: Around, module: Any) -> Any:
    from transformers import PreTrainedModel

    for part in module.modules():
        if isinstance(part, PreTrainedModel):
            _make_mapping(part)
    return original(module)


def _make_mapping(model: Any) -> None:
    # On the instance: the class belongs to somebody else, and the name of the embedding is the instance's.
    keys = model._tied_weights_keys
    if isinstance(keys, list | tuple | set):
        embedding = model.get_input_embeddings().weight
        same = [name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is embedding]
        source = next(name for name in same if name not in keys)
        model._tied_weights_keys = dict.fromkeys(keys, source)


register(RemoteTiedKeysList())
