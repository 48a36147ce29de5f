"""python ray_here.py [dashboard]: a Ray as trainings start it. Says what listens, and ends with its standard input.

With `dashboard`, Ray's job server is there, too, as on a cluster (docs/operations.md); it needs ray[default].
"""

from __future__ import annotations

import json
import os
import sys

import psutil

from raphael.base import ray_cluster


def main() -> None:
    ray_cluster.prepare_environment()
    import ray  # reads the environment now

    dashboard = sys.argv[1:] == ["dashboard"]
    if dashboard:
        start = ray.init
        ray.init = lambda **settings: start(**{**settings, "include_dashboard": True})
    try:
        ray_cluster.start(1, "without Ray there is nothing to attack")
        listeners = {}
        for process in psutil.Process().children(recursive=True):
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    listeners[connection.laddr.port] = process.name()
        context = ray.get_runtime_context()
        settings = {name: value for name, value in os.environ.items() if name.startswith(("RAY_", "GLOO_"))}
        facts = {"gcs": context.gcs_address, "token": ray_cluster.token(), "listeners": listeners, "env": settings}
        page = ray._private.worker._global_node.webui_url if dashboard else None
        print(json.dumps({**facts, "dashboard": page}), flush=True)
        sys.stdin.read()
    finally:
        ray_cluster.stop()


if __name__ == "__main__":
    main()
