"""Tables from the public: whatever is wrong with one is one line that names file and line."""

import pytest

from raphael.base.stage import StageError, read_json
from raphael.evaluate.protocols.csv_tables import Table
from raphael.evaluate.protocols.prompts import protocol_prompts
from raphael.evaluate.protocols.protocol import load_protocol


def test_rows_come_as_they_are_quoted_or_with_tabs(tmp_path):
    (tmp_path / "a.csv").write_text('\ufeffPrompt,id\n"two\nlines, one cell",7\n', encoding="utf-8")
    (tmp_path / "a.tsv").write_text('Prompt\tid\na "quoted word\t8\n')
    assert list(Table(tmp_path / "a.csv", "a table")) == [{"Prompt": "two\nlines, one cell", "id": "7"}]
    assert list(Table(tmp_path / "a.tsv", "a table", tabs=True)) == [{"Prompt": 'a "quoted word', "id": "8"}]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"Prompt,Category\n" + b"x" * 5_000_000, "line 2: field larger than field limit"),
        (b"x" * 5_000_000, "line 1: field larger than field limit"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"", "has no column 'Prompt', got none"),
        (b"id,text\n1,a\n", "has no column 'Prompt', got id, text"),
        (None, "no such file; expected the table with the prompts"),
    ],
)
def test_a_broken_table_is_one_line(tmp_path, body, said):
    file = tmp_path / "DrawBench.csv"
    if body is not None:
        file.write_bytes(body)
    with pytest.raises(StageError, match=said) as caught:
        protocol_prompts(load_protocol("drawbench/v1"), file)
    assert str(caught.value).startswith(str(file)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("body", [b"[" * 200_000, b"[" * 200_000 + b"]" * 200_000, b'{"a": "\xff"}', b"{", b""])
def test_json_of_no_sense_is_one_line(tmp_path, body):
    (tmp_path / "x.json").write_bytes(body)
    with pytest.raises(StageError, match="x.json: not valid JSON") as caught:
        read_json(tmp_path / "x.json")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
