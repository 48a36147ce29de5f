# The same set-up as by `make` on any machine: a test runs these steps outside a container, too.
# The digest is that of August 2026 (Python 3.11.15, Debian trixie): a newer one by `docker buildx imagetools inspect`.
FROM python:3.11-slim@sha256:90744cff8f32887f075c47d747a173ff333e9e98801667af93c357fa9f5e28ff

RUN apt-get update \
    && apt-get install --yes --no-install-recommends git make libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home raphael \
    && install --directory --owner=raphael --group=raphael /raphael /state /workspace

ENV DO_NOT_TRACK=true \
    DVC_NO_ANALYTICS=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    NO_ALBUMENTATIONS_UPDATE=1 \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    RAY_USAGE_STATS_ENABLED=0

WORKDIR /raphael

USER raphael
COPY --chown=raphael:raphael . .
# `make cluster`, because the recipes in cluster/ run this image. Without the repository's .git DVC works on the folder alone.
RUN make setup cluster licences && .venv/bin/dvc config --local core.no_scm true

ENV PATH=/raphael/.venv/bin:$PATH
CMD ["make", "demo"]
