"""`python -m flows.workspace DIR`"""

from flows.workspace.folder import main

if __name__ == "__main__":
    raise SystemExit(main())
