"""What counts as the code of a program: a small project is written down, edited, and looked at again."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from raphael.base.code.graph import CodeGraph, Use

TREE = {
    "raphael/__init__.py": "",
    "raphael/base/stage.py": "def main(run):\n    return run()\n",
    "raphael/train.py": """
        '''The program.'''
        from raphael.base.stage import main
        from raphael.net import moe
        from raphael import words

        def run(images: int = 3):
            '''Train.'''
            from raphael.late import helper  # inside
            return moe.layer(helper(images)) + len(words.WORDS)

        if __name__ == "__main__":
            main(run)
        """,
    "raphael/net/__init__.py": "",
    "raphael/net/moe.py": """
        from typing import TYPE_CHECKING
        from raphael.net.parts import gate, other
        if TYPE_CHECKING:
            from raphael.annotated import Thing

        def layer(x):
            return gate(x) * 2

        def unused(x):
            return other(x)
        """,
    "raphael/net/parts.py": """
        SHARE = 0.5

        def gate(x):
            return x * SHARE

        def other(x):
            return x
        """,
    "raphael/annotated.py": "class Thing:\n    size = 1\n",
    "raphael/late.py": "def helper(x):\n    return tool(x)\n\ndef tool(x):\n    return x + 1\n",
    "raphael/words.py": "from pathlib import Path\n\nWORDS = Path(__file__).parent / 'words.yaml'\n",
    "raphael/words.yaml": "# words\nred: 1\n",
    "data_pipeline/__init__.py": "",
}


@pytest.fixture
def tree(tmp_path: Path) -> Callable[..., Use]:
    """write(**{file: text or (old, new) or None}) -> what raphael.train uses after that."""

    def write(changes: dict | None = None) -> Use:
        for name, change in (changes or {}).items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            if change is None:
                file.unlink()
            elif isinstance(change, tuple):
                text = file.read_text()
                assert change[0] in text
                file.write_text(text.replace(*change))
            else:
                file.write_text(textwrap.dedent(change))
        return CodeGraph(tmp_path, ["raphael.base.stage"]).use("raphael.train")

    write(TREE)
    return write


MOE, TRAIN, PARTS = "raphael/net/moe.py", "raphael/train.py", "raphael/net/parts.py"
HARMLESS = {
    "a comment": {MOE: ("return gate(x) * 2", "return gate(x) * 2  # twice")},
    "formatting": {
        MOE: ("return gate(x) * 2", "return (\n        gate(\n            x\n        )\n        * 2\n    )")
    },
    "a docstring": {TRAIN: ("'''Train.'''", "'''Train the network.\n\n    At length.'''")},
    "an annotation": {TRAIN: ("images: int = 3", "images: float = 3")},
    "a new file that nothing imports": {"raphael/net/new.py": "def gate(x):\n    return 9\n"},
    "a new function in an imported file": {PARTS: ("SHARE = 0.5", "SHARE = 0.5\n\ndef more():\n    return 1\n")},
    "code that is imported and not reached": {MOE: ("return other(x)", "return other(x) - 1")},
    "what only that reaches": {PARTS: ("    return x\n", "    return -x\n")},
    "what only annotations name": {"raphael/annotated.py": ("size = 1", "size = 2")},
    "the ground floor": {"raphael/base/stage.py": ("return run()", "return run() or 0")},
    "a comment in data": {"raphael/words.yaml": ("# words", "# some words")},
    "the order of imports": {
        TRAIN: (
            "from raphael.net import moe\nfrom raphael import words",
            "from raphael import words\nfrom raphael.net import moe",
        )
    },
    "a module that was moved": {
        PARTS: None,
        "raphael/net/blocks/__init__.py": "",
        "raphael/net/blocks/pieces.py": TREE[PARTS],
        MOE: ("raphael.net.parts", "raphael.net.blocks.pieces"),
    },
    "a function that was moved to another module": {
        "raphael/late.py": "from raphael.tools import tool\n\ndef helper(x):\n    return tool(x)\n",
        "raphael/tools.py": "def tool(x):\n    return x + 1\n",
    },
}
HARMFUL = {
    "a number": {MOE: ("* 2", "* 3")},
    "a constant": {PARTS: ("0.5", "0.6")},
    "a default": {TRAIN: ("= 3", "= 4")},
    "code behind an import inside a function": {"raphael/late.py": ("x + 1", "x + 2")},
    "what data says": {"raphael/words.yaml": ("red: 1", "red: 2")},
    "what a name means": {MOE: ("import gate, other", "import other as gate, other")},
    "something done while loading": {"raphael/net/__init__.py": "import torch\n\ntorch.set_num_threads(1)\n"},
    "a decorator that registers": {
        PARTS: (
            "SHARE = 0.5",
            "SHARE = 0.5\n\n\ndef register(f):\n    return f\n\n\n@register\ndef new():\n    return 1\n",
        )
    },
    "a fallback import": {PARTS: ("SHARE = 0.5", "try:\n    SHARE = 0.5\nexcept ImportError:\n    SHARE = 1\n")},
}


@pytest.mark.parametrize("edit", HARMLESS)
def test_an_edit_that_cannot_change_a_result_changes_no_digest(tree, edit: str) -> None:
    before = tree()
    assert tree(HARMLESS[edit]).digest == before.digest


@pytest.mark.parametrize("edit", HARMFUL)
def test_an_edit_that_can_change_a_result_changes_the_digest_and_its_file_is_named(tree, edit: str) -> None:
    before = tree()
    after = tree(HARMFUL[edit])
    assert after.digest != before.digest
    named = {name for name in {*before.files, *after.files} if before.files.get(name) != after.files.get(name)}
    expected = {name.removesuffix("/__init__.py").removesuffix(".py") for name in HARMFUL[edit]}
    if edit != "what a name means":  # no text of a definition differs there
        assert {name if "/" in name else name.replace(".", "/") for name in named} == expected


def test_a_module_named_in_a_string_is_used_as_by_python_m(tree) -> None:
    program = "from raphael.net.parts import SHARE\n\nif __name__ == '__main__':\n    print(SHARE)\n"
    tree({"data_pipeline/tool.py": program})
    before = tree({TRAIN: ("return moe.layer", "['-m', 'data_pipeline.tool']\n    return moe.layer")})
    assert "data_pipeline.tool" in before.files
    assert tree({"data_pipeline/tool.py": ("print(SHARE)", "print(SHARE, 1)")}).digest != before.digest


def test_a_module_handed_on_as_a_value_is_used_whole(tree) -> None:
    before = tree({TRAIN: ("return moe.layer", "vars(moe)\n    return moe.layer")})
    assert tree({MOE: ("return other(x)", "return other(x) - 1")}).digest != before.digest


def test_a_cache_that_is_damaged_or_cannot_be_written_is_no_matter(tree, tmp_path: Path) -> None:
    before = tree()
    (cache,) = tmp_path.glob("raphael/__pycache__/code_summaries")
    cache.write_bytes(b"nonsense")
    assert tree().digest == before.digest
    cache.unlink()
    cache.mkdir()
    assert tree().digest == before.digest


def test_an_absent_program_is_named(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match="raphael.nothing: no such module below"):
        CodeGraph(tmp_path).use("raphael.nothing")


def test_what_is_in_a_package_that_is_left_out_counts(tmp_path: Path) -> None:
    for name, text in {
        "raphael/__init__.py": "",
        "raphael/kinds/__init__.py": "KINDS = ('a',)\n",
        "raphael/kinds/work.py": "def run():\n    return 1\n",
        "raphael/program.py": "from raphael.kinds import work\n\nif __name__ == '__main__':\n    work.run()\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    files = CodeGraph(tmp_path, ["raphael.kinds"]).use("raphael.program").files
    assert "raphael.kinds.work" in files and "raphael.kinds" not in files
