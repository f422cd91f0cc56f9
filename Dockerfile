# An image for the nodes of a Ray cluster, with exact versions (constraints.txt). It runs on machines with or without an
# NVIDIA GPU: the CUDA libraries come with torch, the driver with the machine.
#
#   docker build -t registry.example.com/orchestrator:1 .
#   docker build --build-arg EXTRAS=mlflow,trackio -t registry.example.com/orchestrator:1 .
FROM python:3.12-slim

# Triton compiles a small C module for each kernel.
RUN apt-get -qq update \
    && apt-get -qq install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --uid 1000 --create-home orchestrator \
    && install -d -o orchestrator /app /shared /venv
USER orchestrator
WORKDIR /app
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0

# The project's code changes more often than its packages, so it is copied after they are installed.
ARG EXTRAS=
COPY --chown=orchestrator pyproject.toml constraints.txt README.md ./
COPY --chown=orchestrator orchestrator/__init__.py orchestrator/__init__.py
RUN python -m venv /venv \
    && pip install -q --no-cache-dir -c constraints.txt -e ".[$EXTRAS]" "ray[default]"
COPY --chown=orchestrator orchestrator orchestrator
COPY --chown=orchestrator experiments experiments
COPY --chown=orchestrator --chmod=755 deploy/sweep-or-resume deploy/sweep-or-resume

CMD ["orchestrator", "--help"]
