"""What the pages name is there: paths, links between pages, pages that the code points to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", *sorted(page.relative_to(PROJECT).as_posix() for page in (PROJECT / "docs").rglob("*.md"))]
ROOMS = ("raphael", "data_pipeline", "flows", "docs", "tests", "benchmarks")


def words_in_backticks(text: str) -> list[str]:
    """`a b` -> a, b; whole blocks of code count, too."""
    spans = re.findall(r"```.*?```|`[^`]+`", text, flags=re.DOTALL)
    return [word for span in spans for word in span.strip("`").split()]


def named_path(word: str) -> str:
    """The path that a word names, without what may follow it ("raphael/net/unet.py:", "a.py)"); "" for another word."""
    found = re.match(rf"({'|'.join(ROOMS)})/[\w./*{{}},-]*", word)
    return found[0].rstrip(".,") if found else ""


def exists(path: str) -> bool:
    if brace := re.search(r"\{([^}]*)\}", path):
        return all(exists(path.replace(brace[0], part, 1)) for part in brace[1].split(","))
    return any(PROJECT.glob(path.rstrip("/"))) if path.rstrip("/") else True


def missing_paths(text: str, deployments: set[str]) -> list[str]:
    paths = {named_path(word) for word in words_in_backticks(text)} - {""}
    return sorted(path for path in paths if path not in deployments and not exists(path))


@pytest.fixture(scope="module")
def deployments() -> set[str]:
    """Names of flows, which look like paths: raphael/full."""
    flows = re.search(r"deployments raphael/\{([\w,]+)\}", (PROJECT / "Makefile").read_text(encoding="utf-8"))
    assert flows, "the Makefile names the deployments as raphael/{full,...}"
    return {f"raphael/{name}" for name in flows[1].split(",")} | {f"raphael/{{{flows[1]}}}"}


@pytest.mark.parametrize("page", PAGES)
def test_every_path_that_a_page_names_exists(page: str, deployments: set[str]) -> None:
    missing = missing_paths((PROJECT / page).read_text(encoding="utf-8"), deployments)
    assert not missing, f"{page} names {', '.join(missing)}: no such file or folder"


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_somewhere(page: str) -> None:
    text = (PROJECT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|mailto:|#)([^)\s#]+)", text)
    dead = [link for link in links if not (PROJECT / page).parent.joinpath(link).exists()]
    assert not dead, f"{page}: dead links {', '.join(dead)}"


def test_every_page_that_the_code_points_to_exists() -> None:
    dead = []
    for room in ("raphael", "data_pipeline", "flows", "benchmarks", "tests"):
        for file in (PROJECT / room).rglob("*.py"):
            for page in re.findall(r"docs/[\w./-]*\w\.md", file.read_text(encoding="utf-8")):
                if file.name != "test_docs.py" and not (PROJECT / page).exists():
                    dead.append(f"{file.relative_to(PROJECT)}: {page}")
    assert not dead, "\n".join(dead)


def test_every_page_of_decisions_is_in_its_index() -> None:
    folder = PROJECT / "docs/decisions"
    listed = set(re.findall(r"\]\(([\w-]+\.md)\)", (folder / "README.md").read_text(encoding="utf-8")))
    assert listed == {page.name for page in folder.glob("*.md")} - {"README.md"}


def test_the_rules_see_a_path_that_is_gone() -> None:
    text = "`raphael/net/moe/edge.py`, `raphael/net/nothing.py: f`, `tests/{train,no_such}/x.py`, `raphael/full`"
    assert missing_paths(text, {"raphael/full"}) == ["raphael/net/nothing.py", "tests/{train,no_such}/x.py"]
