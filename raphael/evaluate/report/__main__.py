"""`python -m raphael.evaluate.report`: the stage `report`."""

from raphael.base.stage import device_of, main
from raphael.evaluate.report import page

if __name__ == "__main__":
    raise SystemExit(main("report", page.run, page.__doc__ or "", device=device_of))
