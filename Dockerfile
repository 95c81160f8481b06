# syntax=docker/dockerfile:1
# Two images of mtl_dist. Every version is pinned, and neither image runs as root.
#
#   docker build --target cpu -t mtl-dist:cpu .        runs the tests; smaller, without CUDA
#   docker run --rm mtl-dist:cpu
#   docker run --rm mtl-dist:cpu bash launch/quickstart.sh
#
#   docker build --target cuda -t mtl-dist:cuda .      runs launch/ on GPUs
#   docker run --rm --gpus all --ipc=host -v "$PWD/runs:/home/mtl/mtl_dist/runs" mtl-dist:cuda \
#     bash launch/node.sh ddp configs/recipe/multi_digits.yaml
#
# --ipc=host: NCCL and data loaders use shared memory, and a container has only 64 MB of it. User 1000 must be able to
# write to the mounted folder.

ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm@sha256:65a93d69fa75478d554f4ad27c85c1e69fa184956261b4301ebaf6dbb0a3543d
# the CUDA version of torch's wheels on PyPI; a devel image, because DeepSpeed compiles operators at first use
ARG CUDA_IMAGE=nvidia/cuda:13.0.2-devel-ubuntu24.04@sha256:5dc1bca23d05bd37b011be68ec470c03b403a5da07ec3a86e41af9470e9d0cc6


FROM ${PYTHON_IMAGE} AS cpu
ARG DEBIAN_FRONTEND=noninteractive
# g++ for DeepSpeed's operators, chromium for the tests of the HTML report
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends chromium g++ \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 mtl
USER 1000:1000
WORKDIR /home/mtl/mtl_dist

# The index with the wheels of torch without CUDA. pip prefers their version (+cpu) to the plain version of PyPI.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 OMP_NUM_THREADS=1
# layers, ordered from rarely to often changed: torch, the other dependencies, the code
COPY --chown=mtl:mtl constraints.txt ./
RUN python -m venv .venv \
    && .venv/bin/pip install -c constraints.txt --extra-index-url "${TORCH_INDEX}" torch numpy
COPY --chown=mtl:mtl pyproject.toml README.md LICENSE ./
COPY --chown=mtl:mtl mtl_dist/__init__.py mtl_dist/__init__.py
# the variables also apply to isolated builds (the second one from pip 25.3 on)
RUN PIP_CONSTRAINT="$PWD/constraints.txt" PIP_BUILD_CONSTRAINT="$PWD/constraints.txt" \
    .venv/bin/pip install -c constraints.txt -e ".[dev]"
COPY --chown=mtl:mtl . .
# tells the scripts in launch/ that nothing is left to install
RUN bash -c 'source launch/_setup.sh && mark_installed recipes recipes,deepspeed test dev'
CMD ["bash", "launch/test.sh"]


FROM ${CUDA_IMAGE} AS cuda
ARG DEBIAN_FRONTEND=noninteractive
# Ubuntu 24.04 has Python 3.12 and a user with uid 1000
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN userdel --remove ubuntu && useradd --create-home --uid 1000 mtl
USER 1000:1000
WORKDIR /home/mtl/mtl_dist

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
COPY --chown=mtl:mtl constraints.txt ./
RUN python3 -m venv .venv \
    && .venv/bin/pip install -c constraints.txt torch numpy
COPY --chown=mtl:mtl pyproject.toml README.md LICENSE ./
COPY --chown=mtl:mtl mtl_dist/__init__.py mtl_dist/__init__.py
RUN PIP_CONSTRAINT="$PWD/constraints.txt" PIP_BUILD_CONSTRAINT="$PWD/constraints.txt" \
    .venv/bin/pip install -c constraints.txt -e ".[all]"
COPY --chown=mtl:mtl . .
RUN bash -c 'source launch/_setup.sh && mark_installed recipes recipes,deepspeed'
CMD ["bash", "launch/quickstart.sh"]
