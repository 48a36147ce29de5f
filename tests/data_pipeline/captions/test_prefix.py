"""captions.prefix: a word before every caption that is kept."""

from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.captions import stage
from data_pipeline.common.places import CAPTIONS, FILTERED
from data_pipeline.common.schema import CAPTION, CAPTION_COLUMNS, HEIGHT, KEY, WIDTH
from raphael.base.config.params import load_config
from raphael.base.stage import Stage
from raphael.base.strict import to_dict


@pytest.mark.parametrize(("prefix", "first"), [("", "a red circle"), ("xyz", "xyz a red circle")])
def test_it_stands_before_every_caption_and_saves_none_from_the_rules(project, tmp_path, monkeypatch, prefix, first):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("data_pipeline.common.dropped.dropped", lambda config: {})
    rows = [
        {KEY: f"{n}", CAPTION: text, WIDTH: 64, HEIGHT: 64}
        for n, text in enumerate(("a red circle", "a", "<b>two</b> stars"))
    ]
    columns = {name: [row.get(name, "s") for row in rows] for name in CAPTION_COLUMNS}
    types = {name: pa.int32() if name in (WIDTH, HEIGHT) else pa.string() for name in CAPTION_COLUMNS}
    (tmp_path / FILTERED).parent.mkdir(parents=True)
    schema = pa.schema(list(types.items()))
    pq.write_table(pa.table(columns, schema=schema), tmp_path / FILTERED)
    config = load_config(project / "params.yaml")
    config = replace(config, captions=replace(config.captions, prefix=prefix))
    stage.run(config, Stage("captions", tmp_path))
    assert pq.read_table(tmp_path / CAPTIONS)[CAPTION].to_pylist() == [first, f"{prefix} two stars".strip()]
    assert ("prefix" in to_dict(config.captions)) == bool(prefix)
