"""`python -m raphael.cli`: the command `raphael`."""

from raphael.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
