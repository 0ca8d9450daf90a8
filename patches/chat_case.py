"""What the probes of chat templates share: a conversation with a tool call, and a tokenizer of single bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TURN = "<|im_end|>"
SPECIAL = (END_OF_TURN, "<|im_start|>", "<think>", "</think>")


def conversation(*, call: bool) -> dict[str, Any]:
    """A record as it stands in a file: OpenAI's form, arguments as a JSON string.

    Args:
        call: Whether the assistant calls a tool before it answers.
    """
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Will it rain?"}]
    if call:
        function = {"name": "get_weather", "arguments": '{"city": "Mysuru"}'}
        messages += [
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": "call00001", "type": "function", "function": function}],
            },
            {"role": "tool", "tool_call_id": "call00001", "content": "dry"},
        ]
    messages.append({"role": "assistant", "content": "It will stay dry."})
    return {"messages": messages}


def tokenizer(template: str) -> PreTrainedTokenizerBase:
    """A tokenizer with one token a byte, ChatML's and the think block's marks, and this chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {piece: index for index, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    made: PreTrainedTokenizerBase = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END_OF_TURN)
    made.chat_template = template
    return made
