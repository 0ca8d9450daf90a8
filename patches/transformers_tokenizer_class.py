"""Transformers 5 saves tokenizers in terms that Transformers 4 does not know."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qat.patches.protocol import Place, ProbeResult, Status
from qat.patches.registry import register
from qat.patches.replacing import Around, ReplacingPatch
from qat.patches.tiny import scratch
from qat.storage import write_atomic

_FILE = "tokenizer_config.json"
# In Transformers 5 the first is a name for the second; Transformers 4 knows the second only.
_NEW_CLASS, _CLASS = "TokenizersBackend", "PreTrainedTokenizerFast"
_NEW_TOKENS, _TOKENS = "extra_special_tokens", "additional_special_tokens"


class TransformersTokenizerClass(ReplacingPatch):
    """Writes the tokenizer's class and its special tokens under the names that both major versions read."""

    name = "transformers_tokenizer_class"
    title = "A tokenizer saved by Transformers 5 cannot be loaded by Transformers 4, nor by engines that stand on it"
    breaks = (
        '"ValueError: Tokenizer class TokenizersBackend does not exist or is not currently imported." and '
        "\"AttributeError: 'list' object has no attribute 'keys'\" (extra_special_tokens) when a server starts"
    )
    upstream = "transformers/tokenization_utils_base.py: PreTrainedTokenizerBase.save_pretrained"
    affects = "saved with transformers >=5.0 (5.19 seen), loaded with transformers 4 (4.57.3 seen)"
    libraries = ("transformers",)
    place = Place.HERE
    repair = (
        f"tokenizer_config.json says {_CLASS} and {_TOKENS}, which Transformers 5 reads as well (`qat export` copies "
        "the base's file). With other tools: copy the base's tokenizer files instead of saving the tokenizer."
    )

    def probe(self) -> ProbeResult:
        """Save a tokenizer of two letters with a special token beside them."""
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        letters = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
        with scratch() as folder:
            PreTrainedTokenizerFast(tokenizer_object=letters, extra_special_tokens=["<x>"]).save_pretrained(folder)
            saved = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        tokens = next((name for name in (_NEW_TOKENS, _TOKENS) if isinstance(saved.get(name), list)), "nowhere")
        detail = f"saved as {saved['tokenizer_class']} with its special tokens in {tokens}"
        if saved["tokenizer_class"] == _NEW_CLASS or tokens != _TOKENS:
            return ProbeResult(Status.NEEDED, detail)
        return self.absent(detail)

    def replacements(self) -> Iterable[tuple[object, str, Around]]:
        """Go over the file after it is written."""
        from transformers import PreTrainedTokenizerBase

        yield PreTrainedTokenizerBase, "save_pretrained", _save


def _save(original: Around, tokenizer: Any, *args: Any, **kwargs: Any) -> Any:
    files = original(tokenizer, *args, **kwargs)
    for path in {Path(file) for file in files or () if str(file).endswith(_FILE)}:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("tokenizer_class") == _NEW_CLASS:
            content["tokenizer_class"] = _CLASS
        if isinstance(content.get(_NEW_TOKENS), list):
            content[_TOKENS] = content.pop(_NEW_TOKENS)
        write_atomic(path, json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    return files


register(TransformersTokenizerClass())
