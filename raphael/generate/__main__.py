"""`python -m raphael.generate`: the stage `generate`."""

from raphael.base.stage import device_of, main
from raphael.generate import stage

if __name__ == "__main__":
    raise SystemExit(main("generate", stage.run, stage.__doc__ or "", device=device_of))
