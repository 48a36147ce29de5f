"""`python -m data_pipeline.captions`: the stage `captions`."""

from data_pipeline.captions import stage
from raphael.base.stage import main

if __name__ == "__main__":
    raise SystemExit(main("captions", stage.run, stage.__doc__ or ""))
