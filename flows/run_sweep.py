"""`make sweep`: the flow raphael/sweep in this process, with a Prefect server of its own that ends with it.

python -m flows.run_sweep [--plan flows/plans/sweep.yaml]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from flows.environment import prepare
from flows.serve.servers import prefect_for_one_run
from flows.sweep.plan import PLAN, load_plan
from raphael.base.stage import one_clear_line


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", type=Path, default=PLAN, help="what is tried (default: %(default)s)")
    arguments = parser.parse_args(argv)
    with one_clear_line("sweep") as outcome:
        root = Path.cwd()
        load_plan(arguments.plan)
        prepare(root)
        with prefect_for_one_run(root):
            from flows.sweep.flow import sweep

            print(f"page  {sweep(str(arguments.plan))}", flush=True)
    return outcome.status


if __name__ == "__main__":
    raise SystemExit(main())
