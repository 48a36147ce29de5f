"""`python -m data_pipeline.tools.verify`: one line a bad file, status 1 where there is one."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from data_pipeline.tools.verify.judge import verify
from raphael.base.stage import one_clear_line


def main(argv: list[str] | None = None) -> int:
    about = "Read every file below data/ and models/ and name each that is not what was written."
    parser = argparse.ArgumentParser(prog="verify", description=about)
    parser.add_argument("--params", default="params.yaml", help="its folder is the workspace (default: %(default)s)")
    parser.add_argument("--cache", action="store_true", help="read DVC's cache, too")
    arguments = parser.parse_args(argv)
    with one_clear_line("verify") as outcome:
        found = verify(Path(arguments.params).resolve().parent, arguments.cache)
        for line in found.bad:
            print(f"verify: {line}", file=sys.stderr)
        known = f"{len(found.unknown):,} of them with no hash on record" if found.unknown else "each by its hash"
        print(f"verify: read {found.files:,} files, {found.size / 1e9:,.3f} GB ({known}): {len(found.bad):,} bad")
        outcome.status = 1 if found.bad else 0
    return outcome.status


if __name__ == "__main__":
    raise SystemExit(main())
