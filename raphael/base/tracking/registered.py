"""From a model's address in MLflow's registry to the folder that holds its weights."""

from __future__ import annotations

import re
from pathlib import Path

from raphael.base.config.params import load_config
from raphael.base.integrity.contents import model_sha256
from raphael.base.stage import StageError
from raphael.base.tracking.registry import BEST
from raphael.base.tracking.tracker import connect, public, resolve_uri

REGISTRY = "models:/"
ADDRESS = re.compile(r"models:/([\w.-]+)(?:@([\w.-]+)|/(\d+))")


def registered_folder(address: str, params: str | Path = "params.yaml") -> Path:
    """Where the weights of models:/NAME@ALIAS or models:/NAME/VERSION lie, by the store that `params` names.

    Raises StageError where there is no such model, or its folder is gone or holds another model by now.
    """
    parts = ADDRESS.fullmatch(address)
    if parts is None:
        raise StageError(f"{address}: expected {REGISTRY}NAME@ALIAS, such as {REGISTRY}raphael@{BEST}, or NAME/VERSION")
    name, alias, number = parts.groups()
    root = Path(params).resolve().parent
    uri = resolve_uri(load_config(params), root)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise StageError(f"{address}: no tracking store at {uri}; train first, or set tracking.uri in {params}")
    try:
        client = connect(uri)
        version = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, number)
    except Exception as error:  # of SQLAlchemy, requests, MLflow
        reason = " ".join(str(error).split())[:160]
        raise StageError(f"{address}: not in the registry of {public(uri)} ({reason})") from None
    folder, sha256 = root / version.tags.get("path", ""), version.tags.get("sha256")
    if not (folder / "manifest.json").is_file():
        raise StageError(f"{address}: its weights should lie in {folder}, where no checkpoint is; dvc pull, or train")
    if (here := model_sha256(folder)) != sha256:
        raise StageError(
            f"{address}: {folder} holds {here[:16]} by now, expected {str(sha256)[:16]}; check out the version of "
            "dvc.lock that it was made with"
        )
    return folder
