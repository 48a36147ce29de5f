"""What every number of reports/evaluate.json means nothing without: by which protocol, on what, read by whom."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from typing import Any

from raphael.base.config.sampling import Sampling
from raphael.base.strict import to_dict
from raphael.evaluate.metric import Found
from raphael.evaluate.protocols.protocol import Protocol
from raphael.evaluate.protocols.workspace import Workspace
from raphael.evaluate.scenes.truth import READER, READER_VERSION

SAMPLER = (*(option.name for option in fields(Sampling)), "seed")  # options that came later are there where set


def protocol_facts(protocol: Protocol, found: Found, subject: Workspace, facts: dict[str, Any]) -> dict[str, Any]:
    """-> {identity, sha256, prompts, n, n_reference, sampling, model, networks, readers, metrics, absent}.

    sha256: of all that the protocol says. networks: name -> sha256 of weights. metrics: metric -> its numbers' names;
    absent: metric -> what is missing and what makes it.
    """
    said = json.dumps(to_dict(protocol), sort_keys=True, ensure_ascii=False)
    settings = facts["settings"]
    read = any(number.network == READER for number in found.numbers)
    pairs = subject.pairs if any(number.network not in ("", READER) for number in found.numbers) else []
    return {
        "identity": protocol.identity,
        "sha256": hashlib.sha256(said.encode()).hexdigest()[:16],
        "prompts": facts["prompts"],
        "n": len(subject.entries),
        "n_reference": pairs[0].theirs.count if pairs and pairs[0].theirs is not None else 0,
        "reference": protocol.reference,
        "sampling": {name: settings[name] for name in SAMPLER if name in settings},
        "model": facts["model"],
        "networks": {pair.network.name: pair.network.network for pair in pairs},
        "readers": {READER: READER_VERSION} if read else {},
        "metrics": found.by_metric,
        "absent": found.absent,
    }
