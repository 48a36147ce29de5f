"""Where a pipeline's folder may be given, a name may stand: of the models that come with this package."""

from __future__ import annotations

import difflib
from pathlib import Path

from raphael.base.stage import StageError

HOME = Path(__file__).resolve().parent  # in a workspace its own, with links to the project's models
MANIFEST, META = "manifest.json", "meta.json"
TRAINED = Path("models/raphael")  # what the stage train leaves in a workspace
DEFAULT = "scenes"
KINDS = (  # what people point at instead, by a file in it, and what to do
    ("model_index.json", "diffusers' form", "make a pipeline folder of it: raphael import {0} --out NEW"),
    ("models/raphael/meta.json", "a workspace", "name the pipeline in it: {0}/models/raphael"),
    ("raphael/meta.json", "a folder of models", "name the pipeline in it: {0}/raphael"),
    ("images.json", "a folder of generated images", ""),
    ("model.safetensors", "a text encoder", ""),
    ("diffusion_pytorch_model.safetensors", "an autoencoder", ""),
)


def names() -> list[str]:
    """The models that come with this package, sorted."""
    return sorted(path.parent.name for path in HOME.glob(f"*/{MANIFEST}"))


def find_pipeline(name_or_path: str | Path, root: str | Path = "") -> Path:
    """The pipeline folder: a path, or a name of `names()`. What is in it is verified by whoever reads it.

    root: what a relative path begins at. A pipeline folder of that path comes before a name. A file is handed back as
    it is: its reader says what it is.
    Raises StageError, which says what lies there instead, what was expected, and the names.
    """
    path = Path(root) / name_or_path
    if (path / MANIFEST).is_file() and (path / META).is_file():
        return path
    known = names()
    if str(name_or_path) in known:
        return HOME / str(name_or_path)
    expected = f"expected a pipeline folder, such as {TRAINED} (run the stage train, or dvc pull)"
    if known:
        expected += f", or the name of a model that comes with this package: {', '.join(known)}"
    if not path.exists():
        near = difflib.get_close_matches(str(name_or_path), known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise StageError(f"{name_or_path}: no such folder; {expected}{hint}")
    for file, kind, advice in KINDS if path.is_dir() else ():
        if (path / file).is_file():
            raise StageError(f"{name_or_path}: is {kind}; {advice.format(name_or_path) or expected}")
    if path.is_dir() and not any(path.iterdir()):
        raise StageError(f"{name_or_path}: is an empty folder; {expected}")
    return path


def default_pipeline(root: str | Path = ".") -> tuple[Path, str]:
    """The model to use where none was named, and what to tell of it: the trained one of the workspace `root`, or ours.

    Nothing is told of a trained one: it is what everybody expects.
    """
    trained = Path(root) / TRAINED
    if trained.exists() or DEFAULT not in names():
        return trained, ""
    folder = HOME / DEFAULT
    return folder, f"no model was named and none is in {TRAINED}: using {DEFAULT}, which comes with this package"
