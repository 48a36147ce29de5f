"""Which pretrained parts may come from outside a model's folder: those that the settings of the workspace name, and
any, after the user's word (`--allow-remote`).

A model's folder can be a stranger's, and says by pointers where its parts lie (raphael/encoders/pretrained.py). Both
words stand in the environment, so that the processes that this one starts have them too.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raphael.base.config.params import Config

ALLOW_REMOTE = "RAPHAEL_ALLOW_REMOTE"  # 1: the same as --allow-remote, for programs in Python
OF_SETTINGS = "RAPHAEL_PARTS_OF_SETTINGS"
REVISION = "@"  # <hub id>@<commit>
COMMIT = re.compile(r"[0-9a-f]{40}")  # a branch or a tag can be moved, a commit not


def add_option(parser: argparse.ArgumentParser) -> None:
    """--allow-remote; what it says counts from the moment at which it is read."""
    parser.add_argument(
        "--allow-remote", action=_Allow, nargs=0,
        help="let the checkpoint's pointers lead out of its folder: to folders here, and to the hub at a pinned commit",
    )  # fmt: skip


class _Allow(argparse.Action):
    def __call__(self, *_: object, **__: object) -> None:
        allow_remote()


def allow_remote() -> None:
    os.environ[ALLOW_REMOTE] = "1"


def remote_is_allowed() -> bool:
    return os.environ.get(ALLOW_REMOTE) == "1"


def trust_settings(config: Config) -> None:
    """From now on a pointer may lead to what these settings name: who wrote them has chosen it."""
    named = {*_named(), config.autoencoder.pretrained, config.clip.pretrained} - {""}
    os.environ[OF_SETTINGS] = json.dumps(sorted(named))


def is_of_settings(spec: str) -> bool:
    """Whether the settings name it, with this commit or without one."""
    name, _, commit = spec.rpartition(REVISION)
    return spec in _named() or (name in _named() and bool(COMMIT.fullmatch(commit)))


def _named() -> set[str]:
    return set(json.loads(os.environ.get(OF_SETTINGS, "[]")))
