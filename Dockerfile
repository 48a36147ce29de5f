# The same set-up as by `make` on any machine: a test runs these steps outside a container, too.
FROM python:3.11-slim

RUN apt-get update \
    && apt-get install --yes --no-install-recommends git make libgomp1 \
    && rm -rf /var/lib/apt/lists/*

ENV DO_NOT_TRACK=true \
    DVC_NO_ANALYTICS=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    NO_ALBUMENTATIONS_UPDATE=1 \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    RAY_USAGE_STATS_ENABLED=0

WORKDIR /raphael

COPY . .
# `make cluster`, because the recipes in cluster/ run this image. Without the repository's .git DVC works on the folder alone.
RUN make setup cluster && .venv/bin/dvc config --local core.no_scm true

ENV PATH=/raphael/.venv/bin:$PATH
CMD ["make", "demo"]
