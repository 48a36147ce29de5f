"""Who may speak to the servers of `make up`: one random string, in files that only their owner can read.

    .run/login                    raphael:<256 random bits>: Prefect's page takes the line, MLflow's user and password
    .run/prefect/profiles.toml    the same for Prefect's command line, which finds it by `profiles_path` in prefect.toml

The string is new whenever nothing of `make up` runs, and removed by `make down`. It never stands on a command line,
which every user of the machine can read, and never in a log.
"""

from __future__ import annotations

import base64
import os
import secrets
from pathlib import Path

from raphael.base.stage import StageError
from raphael.base.web.door import own_names

USER = "raphael"
LOGIN = "login"
PROFILE = """# Written by make up, removed by make down; other settings belong into prefect.toml.
active = "raphael"

[profiles.raphael]
PREFECT_API_AUTH_STRING = "{auth}"
"""
ONLY_THE_OWNER = 0o077  # a umask: files 0600, folders 0700


def fresh() -> str:
    return f"{USER}:{secrets.token_urlsafe(32)}"


def known(root: Path) -> str | None:
    """The string that `make up` wrote, or None."""
    try:
        return (root / ".run" / LOGIN).read_text(encoding="utf-8").strip() or None
    except FileNotFoundError:
        return None


def renew(root: Path) -> str:
    """A new string, written where Prefect's command line and a person find it."""
    auth = fresh()
    _write(_profiles(root), PROFILE.format(auth=auth))
    _write(root / ".run" / LOGIN, f"{auth}\n")
    return auth


def forget(root: Path) -> None:
    for file in (root / ".run" / LOGIN, _profiles(root)):
        file.unlink(missing_ok=True)


def private_folder(folder: Path) -> Path:
    """Make `folder` if it is absent, and close it to other users. Raises StageError where it is somebody else's."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        if folder.stat().st_mode & ONLY_THE_OWNER:
            folder.chmod(0o700)
    except PermissionError:
        raise StageError(
            f"{folder}: belongs to another user; expected a folder of yours, since secrets go there"
        ) from None
    return folder


def open_private(file: Path) -> int:
    """A descriptor for writing `file` anew that nobody else can open, whatever the file was before."""
    file.unlink(missing_ok=True)  # who has an old one open keeps reading the old one
    return os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)


def header(auth: str) -> dict[str, str]:
    """The string as HTTP's Basic authentication, which Prefect and MLflow's clients send, too."""
    return {"Authorization": f"Basic {base64.b64encode(auth.encode()).decode()}"}


def for_prefect_client(auth: str) -> dict[str, str]:
    return {"PREFECT_API_AUTH_STRING": auth}


def for_prefect_server(auth: str, port: int, root: Path) -> dict[str, str]:
    """The environment of a Prefect server on loopback that only its own page and our clients can use."""
    return {
        "PREFECT_SERVER_API_AUTH_STRING": auth,
        **for_prefect_client(auth),  # its own services ask the API, too
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": ",".join(f"http://{name}" for name in own_names(port)),
        "PREFECT_UI_STATIC_DIRECTORY": str(root / ".run" / "prefect" / "ui"),  # else into the installed package
        "RAPHAEL_GUARD_HOSTS": ",".join(own_names(port)),
    }


def for_mlflow_server(auth: str, port: int) -> dict[str, str]:
    names = own_names(port)
    return {
        "RAPHAEL_GUARD_HOSTS": ",".join(names),
        "RAPHAEL_GUARD_AUTH": auth,
        "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(names),  # its default lets 10.evil.example in
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": ",".join(f"http://{name}" for name in names),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # a dozen idle processes for evaluations that we do not use
    }


def refuse_another_string(auth: str) -> None:
    """Raise StageError where the environment makes Prefect's command line send another string than ours."""
    if os.environ.get("PREFECT_API_AUTH_STRING", auth) != auth:
        raise StageError("PREFECT_API_AUTH_STRING in the environment would be sent in place of make up's own; unset it")


def _profiles(root: Path) -> Path:
    return root / ".run" / "prefect" / "profiles.toml"


def _write(file: Path, text: str) -> None:
    private_folder(file.parent)
    new = file.with_name(f".{file.name}.new")
    with open(open_private(new), "w", encoding="utf-8") as stream:
        stream.write(text)
    os.replace(new, file)
