"""`python -m data_pipeline.clip`: the stage `clip`."""

from data_pipeline.clip import stage
from raphael.base.stage import device_of, main

if __name__ == "__main__":
    raise SystemExit(main("clip", stage.run, stage.__doc__ or "", device=device_of))
