"""`raphael train --guide classifier|clip`: `python -m raphael.systems.guides`."""

from raphael.systems.guides.work import main

if __name__ == "__main__":
    raise SystemExit(main())
