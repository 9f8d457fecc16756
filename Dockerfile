# The image of every node of a GPU cluster: driver, replicas and training workers alike. The same install path and the same pinned torch
# as on a laptop; from PyPI, that is the CUDA build.
FROM nvidia/cuda:12.8.1-cudnn-devel-ubuntu24.04

RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv python3-dev make git openssh-client wget \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY pyproject.toml constraints.txt Makefile README.md ./
COPY fusegpt_ray fusegpt_ray
COPY jobs jobs
COPY examples examples
RUN make install
ENV PATH=/app/.venv/bin:$PATH \
    HF_HUB_DISABLE_TELEMETRY=1 \
    RAY_USAGE_STATS_ENABLED=0

# Nothing needs root; credentials come from the environment or the provider's chain, never from the image.
RUN useradd --create-home --uid 1001 fusegpt && chown -R fusegpt /app
USER fusegpt
CMD ["fusegpt", "--help"]
