"""`python -m data_pipeline.download`: the stage `download`."""

from data_pipeline.download import stage
from raphael.base.stage import main

if __name__ == "__main__":
    raise SystemExit(main("download", stage.run, stage.__doc__ or ""))
