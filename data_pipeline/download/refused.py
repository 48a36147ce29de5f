"""Images that are not taken for their bytes, whatever they show."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline.common.hashes.lists import HashLists
    from raphael.base.config.params import Config


@dataclasses.dataclass(frozen=True)
class Refused:
    """Images that are not taken for their bytes: those on hash lists, and those whose owners said no by a hash."""

    lists: HashLists
    owners: HashLists

    @classmethod
    def of(cls, config: Config) -> Refused:
        from data_pipeline.common.hashes.lists import HashLists
        from data_pipeline.common.opt_out import OptOut

        opt_out = OptOut.read(config.filter.opt_out)
        return cls(HashLists.read(config.download.hash_lists), HashLists(opt_out.md5, opt_out.sha256))

    @property
    def fingerprint(self) -> list[Any]:
        """Empty where there is nothing to refuse."""
        owners = sorted(self.owners.md5 | self.owners.sha256)
        return [self.lists.fingerprint, owners] if self.lists.fingerprint or owners else []

    def why_not(self, body: bytes) -> str:
        from data_pipeline.common.hashes.lists import ON_LIST
        from data_pipeline.common.rules import OPTED_OUT

        if self.lists.has_bytes(body):
            return ON_LIST
        return OPTED_OUT if self.owners.has_bytes(body) else ""

    def summary(self) -> dict[str, int]:
        return self.lists.summary()
