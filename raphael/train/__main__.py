"""`python -m raphael.train`: the stage `train`."""

from raphael.base.stage import main
from raphael.systems import train_stage

if __name__ == "__main__":
    raise SystemExit(main("train", train_stage.run, train_stage.__doc__ or "", device=train_stage.device_of))
