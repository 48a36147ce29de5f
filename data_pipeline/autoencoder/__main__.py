"""`python -m data_pipeline.autoencoder`: the stage `autoencoder`."""

from data_pipeline.autoencoder import stage
from raphael.base.stage import device_of, main

if __name__ == "__main__":
    raise SystemExit(main("autoencoder", stage.run, stage.__doc__ or "", device=device_of))
