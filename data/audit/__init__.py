"""What is wrong with a set of conversations before a single step is trained on it.

Faults make the set unfit: it would train another prompt than the served one, calls that no server accepts, replies that
the suite forbids, answers that the suite asks for, or nothing. Warnings are what usually costs a run: cut rows, few
supervised tokens, repeated user turns, a lopsided mix. A fault can be accepted by its code, a reply's by its check.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from qat.data.audit.contract import prompt_diff
from qat.data.audit.examine import Examiner, Settings
from qat.data.audit.findings import AuditReport, Finding, Place
from qat.data.audit.replies import Demands
from qat.data.audit.stream import tallies
from qat.data.audit.summary import summarise
from qat.data.audit.tally import Tally
from qat.data.audit.texts import TextStores
from qat.data.forms import Form
from qat.data.load import form_of
from qat.data.records import Source
from qat.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qat.data.schema import Conversation, Persona

__all__ = ["AuditReport", "Finding", "Settings", "audit", "audit_source", "prompt_diff"]


def audit(
    conversations: Sequence[Conversation],
    persona: Persona,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    demands: Demands | None = None,
    accept: Collection[str] = (),
) -> AuditReport:
    """Audit loaded conversations against the persona that will be served.

    Args:
        conversations: As `load_conversations` returns them.
        persona: The persona: its prompt and tools must be those of every conversation, byte for byte.
        tokenizer: The base model's tokenizer with the chat template of training and serving.
        max_length: Longest training row, in tokens.
        demands: What the suite demands of every reply (`qat.behavior.demands`); None judges none.
        accept: Codes of faults that do not forbid training.

    Returns:
        The report. Long lists are cut to the first few, with their full count.
    """
    settings = Settings(persona, max_length, tokenizer, demands, accept=frozenset(accept))
    examiner = Examiner(settings)
    tally = Tally()
    for number, conversation in enumerate(conversations):
        examiner.look(conversation, Place(0, number, conversation["id"]), tally)
    with TextStores() as stores:
        stores.take(tally)
        return summarise(tally, stores.numbers(), settings, lambda place: place.id or f"number {place.number}")


def audit_source(
    source: Source,
    settings: Settings,
    form: Form | None = None,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> AuditReport:
    """Audit a file or folder of any size, streamed.

    Args:
        source: The records.
        settings: What is looked at.
        form: Of the records; None to tell it from the first few.
        workers: Processes; 0 examines in this one; None: two where the source is large.
        progress: Hears how many bytes of JSON were looked at.

    Returns:
        The report; faults of single records are findings of it.

    Raises:
        UserError: The source cannot be read.
    """
    form = form or form_of(source)
    whole = Tally()
    with TextStores() as stores:
        for tally in tallies(source, form, settings, workers):
            stores.take(tally)
            whole.merge(tally)
            if progress is not None:
                progress.update(whole.numbers["bytes"])
        texts = stores.numbers() if settings.duplicates else None

    def show(place: Place) -> str:
        where = source.place(place.file, place.number)
        return f"{where} ({place.id})" if place.id else where

    report = summarise(whole, texts, settings, show)
    report.numbers = {"source": {"path": str(source.path), "files": source.names, "form": form}, **report.numbers}
    return report
