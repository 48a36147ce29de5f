"""`python -m raphael.evaluate`: the stage `evaluate`."""

from raphael.base.stage import device_of, main
from raphael.evaluate import stage

if __name__ == "__main__":
    raise SystemExit(main("evaluate", stage.run, stage.__doc__ or "", device=device_of))
