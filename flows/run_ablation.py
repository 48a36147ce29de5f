"""`make ablation`: the flow raphael/ablation in this process, with a Prefect server of its own that ends with it.

python -m flows.run_ablation [--plan flows/plans/ablation.yaml] [--jobs 2]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from flows.ablation.plan import PLAN, load_plan
from flows.environment import prepare
from flows.serve.servers import prefect_for_one_run
from raphael.base.stage import one_clear_line


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="ablation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", type=Path, default=PLAN, help="arms and seeds (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=0, help="cases at a time, a core each; 0: one per core")
    arguments = parser.parse_args(argv)
    with one_clear_line("ablation") as outcome:
        root = Path.cwd()
        load_plan(arguments.plan)
        prepare(root)
        with prefect_for_one_run(root):
            from flows.ablation.flow import ablation

            print(f"page  {ablation(str(arguments.plan), arguments.jobs)}", flush=True)
    return outcome.status


if __name__ == "__main__":
    raise SystemExit(main())
