"""`raphael serve`: models over HTTP, and a page to try them on."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from raphael.base import devices
from raphael.base.config import consent
from raphael.cli.options import say_device

QUEUE, SECONDS = 32, 120.0


def add(commands: argparse._SubParsersAction) -> None:
    text = "serve models over HTTP, with a page to try them on (docs/guides/serve.md)"
    command = commands.add_parser("serve", help=text, description=text.capitalize() + ".")
    default = "models/raphael where it is, scenes, which comes with this package, and what else lies in models/"
    command.add_argument(
        "--checkpoint",
        action="append",
        help=f"a pipeline folder, a name, or models:/NAME@ALIAS ; again for another (default: {default})",
    )
    command.add_argument("--host", default="127.0.0.1", help="another one needs --token (default: %(default)s)")
    command.add_argument("--port", type=int, default=8000, help="0: any that is free (default: %(default)s)")
    about = "another name by which it is asked, HOST or HOST:PORT; every other is refused; again for another"
    command.add_argument("--name", action="append", default=[], help=about)
    about = "a file with the token that requests must bring; made where it is not there (else RAPHAEL_SERVE_TOKEN)"
    command.add_argument("--token", type=Path, metavar="FILE", help=about)
    about = "of the network's products; auto: bf16 where the processor has it (default: %(default)s)"
    command.add_argument("--precision", choices=("fp32", "bf16", "auto"), default="fp32", help=about)
    command.add_argument("--queue", type=int, default=QUEUE, help="jobs that may wait (default: %(default)s)")
    command.add_argument("--seconds", type=float, default=SECONDS, help="that a job may take (default: %(default)g)")
    devices.add_option(command)
    consent.add_option(command)
    command.set_defaults(act=_serve)


def _serve(arguments: argparse.Namespace) -> None:
    started_s = time.monotonic()
    from raphael.base.cores.threads import wait_passively

    wait_passively()  # before torch is imported: its threads share the cores with those that answer
    from raphael.base.stage import StageError
    from raphael.pretrained.find import default_pipeline
    from raphael.serve.door.access import read_token
    from raphael.serve.jobs import Limits
    from raphael.serve.models import default_checkpoints, found_folders, open_models
    from raphael.serve.server import Address, serve

    if arguments.queue < 0 or arguments.seconds <= 0:
        raise StageError("--queue, --seconds: expected a queue from 0 and seconds above 0")
    token = read_token(arguments.token)
    address = Address(arguments.host, arguments.port, tuple(arguments.name), token)
    listener = address.bind()  # before the models are read: a port that is taken is told at once
    device = devices.resolve(arguments.device, "--device")
    say_device("serve", device)
    checkpoints = arguments.checkpoint or default_checkpoints(default_pipeline()[0])
    found = [] if arguments.checkpoint else found_folders(checkpoints)
    models = open_models(checkpoints, device, arguments.precision, found)
    serve(models, address, listener, Limits(arguments.queue, arguments.seconds), started_s)
