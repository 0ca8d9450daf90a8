"""The extraction suite: cases of every domain, from a seed."""

from __future__ import annotations

import hashlib
from random import Random

from qat.behavior.conversation import bind_case
from qat.behavior.extraction.domains import DOMAINS, Sample
from qat.behavior.extraction.scoring import Extraction
from qat.behavior.records import Case, canonical_json
from qat.behavior.suite import Suite
from qat.errors import UserError

SYSTEM_PROMPT = (
    "You read a text and return what it says as one JSON object, with exactly the keys that are asked for and nothing "
    "else around it. Give null for what the text does not say."
)
VERSION = "1"


def extraction_suite(per_domain: int = 12, seed: int = 0) -> Suite:
    """So many cases of each domain.

    Args:
        per_domain: Cases of each of `DOMAINS`; the first n are the same whatever the number.
        seed: Other seeds give other texts.

    Raises:
        UserError: Fewer than one case.
    """
    if per_domain < 1:
        raise UserError("The extraction suite needs at least one case of a domain.", value=str(per_domain))
    cases = [
        _case(domain, number, draw(Random(f"{seed}/{domain}/{number}")))
        for domain, draw in DOMAINS.items()
        for number in range(per_domain)
    ]
    scripts = {case.id: bind_case(case)[0] for case in cases}
    digest = hashlib.sha256(canonical_json([case.canonical() for case in cases])).hexdigest()
    return Suite(f"extraction_{seed}", VERSION, "extraction", "JSON from text", tuple(cases), digest, scripts)


def _case(domain: str, number: int, sample: Sample) -> Case:
    keys = "\n".join(f"- {name}: {meaning}" for name, (meaning, _, _) in sample.fields.items())
    fields = {name: {"value": value, "rule": rule} for name, (_, rule, value) in sample.fields.items()}
    return Case.model_validate(
        {
            "id": f"extraction_{domain}_{number}",
            "category": domain,
            "messages": [
                {"role": "system", "content": SYSTEM_PROMPT},
                {"role": "user", "content": f"Text:\n{sample.text}\n\nKeys:\n{keys}"},
            ],
            "checks": [{"check": "extraction", **Extraction.model_validate({"fields": fields}).model_dump()}],
        }
    )
