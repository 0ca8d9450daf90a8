"""Checks of the tokenizer and its special tokens: present, in the vocabulary, and the base's."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from qat.export.doctor.config_fields import CONFIG, flattened, token_ids, whole
from qat.export.doctor.findings import Finding, Severity, examples
from qat.export.doctor.folder import CheckpointView, is_adapter, opened

TOKENIZER = "tokenizer.json"
SETTINGS = "tokenizer_config.json"

#: Any one of these is a tokenizer that some server reads.
_FORMS = (TOKENIZER, "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
#: What the text is cut by; the rest of tokenizer.json (`truncation`, `padding`) is set anew for every call.
_PARTS = ("model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder")
_NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
_BEHAVIOUR = ("add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces")
_COPY = "Copy the base's tokenizer files (`--fix` does)."


class Vocabulary(NamedTuple):
    """The tokens of a `tokenizer.json`.

    Attributes:
        ids: Every token's id.
        added: Tokens beside the model's own, in the order of the file, with their ids.
        special: Those of them that never come from plain text.
    """

    ids: dict[str, int]
    added: tuple[tuple[str, int], ...]
    special: frozenset[str]


def check_tokenizer(view: CheckpointView, base: CheckpointView | None) -> Iterator[Finding]:
    """Check a checkpoint's tokenizer.

    Args:
        view: The checkpoint.
        base: The checkpoint that it was made from.

    Yields:
        Findings; none for an adapter, which is served with its base's tokenizer.
    """
    if is_adapter(view):
        return
    if not any(name in view.files for name in _FORMS) and not any(name.endswith(".tiktoken") for name in view.files):
        lost = base is not None and any(name in base.files for name in _FORMS)
        yield Finding(
            "tokenizer_missing",
            Severity.ERROR if lost else Severity.WARNING,
            TOKENIZER,
            "The folder holds no tokenizer" + (", the base has one" if lost else ""),
            "A server does not start unless it is given a tokenizer from elsewhere.",
            _COPY,
        )
        return
    if TOKENIZER in view.files:
        content = view.read_json(TOKENIZER)
        vocabulary = read_vocabulary(content)
        if content is not None and vocabulary is None:
            problem = "It has no `model` with a `vocab`"
            yield Finding("tokenizer_invalid", Severity.ERROR, TOKENIZER, problem, "No server can load it.", _COPY)
        elif vocabulary is not None:
            yield from _tokens(view, vocabulary)
    if view.tokenizer_config is None and SETTINGS not in view.files:
        problem = "The tokenizer has no settings beside it"
        consequence = "Transformers guesses its class and does not know which tokens begin and end a text."
        yield Finding("tokenizer_settings_missing", Severity.WARNING, SETTINGS, problem, consequence, _COPY)
    if base is not None:
        yield from _files(view, base)
        yield from _settings(view.tokenizer_config or {}, base.tokenizer_config or {})


def read_vocabulary(content: Mapping[str, Any] | None) -> Vocabulary | None:
    """Read the tokens of a parsed `tokenizer.json`; None where it is none."""
    model = (content or {}).get("model")
    listed = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(listed, dict):
        ids = {token: number for token, number in listed.items() if type(number) is int}
    elif isinstance(listed, list):  # Unigram: pairs of token and score, the position is the id
        ids = {str(pair[0]): number for number, pair in enumerate(listed) if isinstance(pair, list) and pair}
    else:
        return None
    entries = (content or {}).get("added_tokens")
    added = [
        (entry["content"], entry["id"], entry.get("special") is True)
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict) and isinstance(entry.get("content"), str) and type(entry.get("id")) is int
    ]
    return Vocabulary(
        ids | {token: number for token, number, _ in added},
        tuple((token, number) for token, number, _ in added),
        frozenset(token for token, _, special in added if special),
    )


def token_text(value: object) -> str | None:
    """Read a token of `tokenizer_config.json`: a string, or an object with its content."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def stop_ids(view: CheckpointView, vocabulary: Vocabulary) -> set[int]:
    """Gather the tokens at which vLLM stops: the tokenizer's, and those of the generation settings.

    `config.json` counts where there is no `generation_config.json` (`ModelConfig.try_get_generation_config`).
    """
    source = flattened(view.config or {}) if view.generation_config is None else view.generation_config
    own = token_text((view.tokenizer_config or {}).get("eos_token"))
    return {*token_ids(source.get("eos_token_id")), *((vocabulary.ids[own],) if own in vocabulary.ids else ())}


def _tokens(view: CheckpointView, vocabulary: Vocabulary) -> Iterator[Finding]:
    config, settings = flattened(view.config or {}), view.tokenizer_config or {}
    rows = whole(config, "vocab_size")
    beyond = [f"{token!r} {number}" for token, number in vocabulary.ids.items() if rows and not 0 <= number < rows]
    if beyond:
        problem = f"Tokens beyond the {rows} rows of the embedding: {examples(beyond)}"
        consequence = "The engine fails at the first prompt that holds one of them, or reads another row."
        yield Finding("tokenizer_vocabulary", Severity.ERROR, TOKENIZER, problem, consequence, _COPY)
    yield from _clashes(vocabulary)
    unknown = sorted(_special_tokens(settings) - vocabulary.ids.keys())
    if unknown:
        problem = f"Special tokens that the vocabulary does not have: {examples(map(repr, unknown))}"
        consequence = "Transformers adds them behind the last token, where the model has no trained row, or none."
        yield Finding("special_token_unknown", Severity.ERROR, SETTINGS, problem, consequence, _COPY)
    generation = view.generation_config or {}
    for key in ("bos_token", "eos_token"):
        number = vocabulary.ids.get(token_text(settings.get(key)) or "")
        given = {*token_ids(config.get(f"{key}_id")), *token_ids(generation.get(f"{key}_id"))}
        if number is not None and given and number not in given:
            yield Finding(
                "special_token_mismatch",
                Severity.WARNING,
                f"{SETTINGS} / {CONFIG}: {key}",
                f"The tokenizer's is {number}, the configurations say {', '.join(map(str, sorted(given)))}",
                "Training and serving begin or end texts with different tokens.",
                "Make the files name one token; the base's are right unless its vocabulary was changed.",
            )


def _special_tokens(settings: Mapping[str, Any]) -> set[str]:
    values = [settings.get(key) for key in _NAMED_TOKENS]
    for key in ("extra_special_tokens", "additional_special_tokens"):
        listed = settings.get(key)
        values += listed.values() if isinstance(listed, dict) else listed if isinstance(listed, list) else ()
    return {token for token in map(token_text, values) if token is not None}


def _clashes(vocabulary: Vocabulary) -> Iterator[Finding]:
    holders: dict[int, set[str]] = {}
    for token, number in vocabulary.added:
        holders.setdefault(number, set()).add(token)
    for token, number in vocabulary.ids.items():
        if number in holders:
            holders[number].add(token)
    shared = [f"{number} {sorted(tokens)}" for number, tokens in holders.items() if len(tokens) > 1]
    times = Counter(token for token, _ in vocabulary.added)
    shared += [f"{token!r} twice" for token in times if times[token] > 1]
    if shared:
        problem = f"Added tokens that share an id or a text: {examples(shared)}"
        consequence = "One of the two cannot be written or read back: a turn does not begin or end as in training."
        yield Finding("added_token_clash", Severity.ERROR, TOKENIZER, problem, consequence, _COPY)


def _files(view: CheckpointView, base: CheckpointView) -> Iterator[Finding]:
    for name in sorted(set(_FORMS) & base.files):
        if name not in view.files:
            # One form of a tokenizer may stand for another: Transformers 5 writes tokenizer.json alone.
            severity = Severity.WARNING if name == TOKENIZER else Severity.NOTE
            problem = "The base has this form of the tokenizer, the checkpoint has another"
            consequence = "Servers that read this form do not find it."
            yield Finding("tokenizer_form_missing", severity, name, problem, consequence, _COPY)
        elif _digest(view, name) != _digest(base, name):
            yield from _difference(name, view, base)


def _difference(name: str, view: CheckpointView, base: CheckpointView) -> Iterator[Finding]:
    detail = "The file's bytes are not the base's"
    if name == TOKENIZER:
        ours, theirs = view.read_json(name) or {}, base.read_json(name) or {}
        parts = [part for part in _PARTS if ours.get(part) != theirs.get(part)]
        if not parts:
            if any(ours.get(part) != theirs.get(part) for part in ("truncation", "padding")):
                problem = "Truncation or padding is left switched on in the file"
                consequence = "Transformers and vLLM set both for every call; readers of the file itself cut texts."
                yield Finding("tokenizer_truncation", Severity.NOTE, name, problem, consequence, _COPY)
            return
        detail = f"{', '.join(parts)} differ from the base's"
        mine, its = read_vocabulary(ours), read_vocabulary(theirs)
        if mine is not None and its is not None and mine.ids != its.ids:
            moved = [token for token, number in its.ids.items() if mine.ids.get(token) != number]
            more = [token for token in mine.ids if token not in its.ids]
            changed = examples(map(repr, moved + more))
            detail += f"; tokens lost, moved or new: {changed}"
    consequence = "Texts become other tokens than in training: the model reads and writes noise or near-misses."
    yield Finding("tokenizer_differs", Severity.ERROR, name, detail, consequence, _COPY)


def _settings(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[Finding]:
    if not ours or not theirs:
        return
    pairs: dict[str, tuple[object, object]]
    pairs = {key: (token_text(ours.get(key)), token_text(theirs.get(key))) for key in _NAMED_TOKENS}
    pairs |= {key: (ours.get(key) or False, theirs.get(key) or False) for key in _BEHAVIOUR}
    differ = [f"{key} {mine!r} here, {its!r} in the base" for key, (mine, its) in pairs.items() if mine != its]
    if differ:
        consequence = "Texts begin, end or are cut into tokens otherwise than in training."
        yield Finding("tokenizer_settings", Severity.WARNING, SETTINGS, "; ".join(differ), consequence, _COPY)
    mine, its = ours.get("tokenizer_class"), theirs.get("tokenizer_class")
    if mine != its:
        problem = f"tokenizer_class is {mine!r}, the base's {its!r}"
        consequence = "Servers with an older Transformers may not know the class (`TokenizersBackend` is new in 5)."
        yield Finding("tokenizer_class", Severity.NOTE, SETTINGS, problem, consequence, _COPY)


def _digest(view: CheckpointView, name: str) -> str | None:
    try:
        with opened(view.folder, name) as descriptor, open(descriptor, "rb", closefd=False) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
