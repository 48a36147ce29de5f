"""`python -m data_pipeline.tools.watermark_model`: the watermark detector of data_pipeline/tools."""

from data_pipeline.tools.watermark_model import main

if __name__ == "__main__":
    raise SystemExit(main())
