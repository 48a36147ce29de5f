"""`python -m data_pipeline.score`: the stage `score`."""

from data_pipeline.score import stage
from raphael.base.stage import main

if __name__ == "__main__":
    raise SystemExit(main("score", stage.run, stage.__doc__ or "", device=stage.device_of))
