"""`python -m data_pipeline.source`: the stage `source`."""

from data_pipeline.source import stage
from raphael.base.stage import main

if __name__ == "__main__":
    raise SystemExit(main("source", stage.run, stage.__doc__ or ""))
