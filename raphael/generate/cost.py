"""`python -m raphael.summary.cost`: the former name of raphael.summary.cost, kept for scripts."""

from raphael.summary.cost import main

if __name__ == "__main__":
    raise SystemExit(main())
