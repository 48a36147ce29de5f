"""`python -m data_pipeline.encode`: the stage `encode`."""

from data_pipeline.encode import stage
from raphael.base.stage import main

if __name__ == "__main__":
    raise SystemExit(main("encode", stage.run, stage.__doc__ or "", device=stage.device_of))
