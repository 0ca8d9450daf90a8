"""The small bases' tokenizer: a byte-level BPE, for the tiny base 3,072 pieces trained on the project's own corpus."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

VOCAB_SIZE = 3072
PAD, BOS, EOS, START = "<pad>", "<s>", "<|im_end|>", "<|im_start|>"
CONTROL = (PAD, BOS, EOS, START)
# Tags are pieces of their own, and stay visible when special tokens are skipped: the server's tool parser reads text.
TAGS = (
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<function=", "</function>", "<parameter=", "</parameter>",
    "<tool_response>", "</tool_response>", "<tools>", "</tools>", "<rules>", "</rules>", "\n<function>\n<name>",
    "</name>\n<description>", "</description>\n<parameters>", "\n<parameter>\n<name>", "</name>\n<type>",
    "</type>\n</parameter>", "\n</parameters>\n</function>",
)  # fmt: skip
TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def train_tokenizer(texts: Iterable[str], size: int = VOCAB_SIZE) -> Any:
    """Train the tokenizer; returns a `PreTrainedTokenizerFast` of `size` pieces with the chat template set."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(TAGS), special_tokens=list(CONTROL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2, show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator(_without_tags(texts), trainer)
    bpe.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=PAD, bos_token=BOS, eos_token=EOS, additional_special_tokens=[START],
        chat_template=TEMPLATE.read_text(encoding="utf-8"), model_max_length=2048, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _without_tags(texts: Iterable[str]) -> Iterable[str]:
    for text in texts:
        for tag in (*CONTROL, *TAGS):
            text = text.replace(tag, "\n")
        yield text
