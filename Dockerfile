# SPDX-License-Identifier: Apache-2.0
# docker build -t gpu-rnn .
# docker run --rm --gpus all gpu-rnn                                                     the demo
# docker run --rm --gpus all -v "$PWD:/out" gpu-rnn gpu-rnn demo --out /out/demo.png    its picture kept
# docker run --rm --gpus all gpu-rnn python tests -m "not slow"                         the tests
FROM python:3.12-slim

# Triton builds a small C module for each kernel's launch. Debian serves one version at a time: a pin would only rot.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 gpu-rnn \
    && install --directory --owner 1000 /gpu-rnn

WORKDIR /gpu-rnn
ENV PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore

# PyTorch and its CUDA libraries first: a change of our code leaves this large layer as it is.
COPY constraints.txt ./
RUN pip install --constraint constraints.txt torch

COPY --chown=1000 . ./
RUN pip install --constraint constraints.txt --editable ".[cuda12,demo,long,test]"

USER 1000
CMD ["gpu-rnn", "demo"]
