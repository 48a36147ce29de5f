"""`python -m flows.serve up | run | down`"""

from flows.serve.deployments import main

if __name__ == "__main__":
    raise SystemExit(main())
