# The image of every node of a GPU cluster: driver, replicas and training workers alike. Each
# package is the one that cluster/requirements.lock names by version and hash (`make lock`); torch
# is the build for the CUDA of the base image. That one's digest:
#   docker buildx imagetools inspect nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04
FROM nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04@sha256:ae7f650405a3964972dacfa889273bf8e3fbe9709899afd187da01c4cdff3105

# wget: KubeRay asks by it whether a node is well. rsync: Ray's launcher brings files by it.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv python3-dev git openssh-client rsync wget \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY cluster/requirements.lock ./
RUN python3 -m venv .venv && .venv/bin/pip install --no-cache-dir --require-hashes --requirement requirements.lock
COPY pyproject.toml README.md ./
COPY fusegpt_ray fusegpt_ray
COPY jobs jobs
COPY examples examples
RUN .venv/bin/pip install --no-cache-dir --no-deps --no-build-isolation --editable .
ENV PATH=/app/.venv/bin:$PATH \
    HF_HUB_DISABLE_TELEMETRY=1 \
    RAY_USAGE_STATS_ENABLED=0

# Nothing needs root, nor writes in /app. Credentials come from the environment or the provider's chain, never from the
# image. 1000 is whom Ray's launcher is on its machines, whose files it shares with the container.
RUN userdel ubuntu && useradd --create-home --uid 1000 fusegpt
USER 1000
CMD ["fusegpt", "--help"]
