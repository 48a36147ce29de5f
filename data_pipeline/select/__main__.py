"""`python -m data_pipeline.select`: the stage `select`."""

from data_pipeline.select import stage
from raphael.base.stage import main

if __name__ == "__main__":
    raise SystemExit(main("select", stage.run, stage.__doc__ or ""))
