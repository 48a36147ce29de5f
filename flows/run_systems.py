"""`make systems`: the flow raphael/systems in this process, with a Prefect server of its own that ends with it.

python -m flows.run_systems [--plan flows/plans/systems.yaml] [--jobs 2]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from flows.environment import prepare
from flows.serve.servers import prefect_for_one_run
from flows.systems.plan import PLAN, load_plan
from raphael.base.stage import one_clear_line


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="systems", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--plan", type=Path, default=PLAN, help="arms, and how much is spent on each (default: %(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=0, help="cases at a time, a core each; 0: one per core")
    arguments = parser.parse_args(argv)
    with one_clear_line("systems") as outcome:
        root = Path.cwd()
        load_plan(arguments.plan)
        prepare(root)
        with prefect_for_one_run(root):
            from flows.systems.flow import systems

            print(f"page  {systems(str(arguments.plan), arguments.jobs)}", flush=True)
    return outcome.status


if __name__ == "__main__":
    raise SystemExit(main())
