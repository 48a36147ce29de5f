"""`python -m data_pipeline.filter`: the stage `filter`."""

from data_pipeline.filter import stage
from raphael.base.stage import main

if __name__ == "__main__":
    raise SystemExit(main("filter", stage.run, stage.__doc__ or ""))
