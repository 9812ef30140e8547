# One image for every part: `serve` (the coordinator, alone or with its experts) and `expert`. See docs/deployment.md.
#
#   docker build --tag token-swarm:0.1.0 .
#   docker build --tag token-swarm:0.1.0-cuda --build-arg TORCH_INDEX=https://pypi.org/simple .

ARG PYTHON_VERSION=3.11

FROM python:${PYTHON_VERSION}-slim-bookworm AS build

# The compiler is for the mixing kernels; it stays in this stage.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --no-install-recommends --yes g++ && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/token-swarm
ENV PATH=/opt/token-swarm/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src

# PyTorch first: it is most of the image, and changes least. This index has builds without CUDA; the Python package
# index has those with it.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY constraints.txt ./
RUN pip install --constraint constraints.txt --extra-index-url "${TORCH_INDEX}" torch

# Extras of pyproject.toml, comma-separated; `demo` converts the demo experts, other models need none.
ARG EXTRAS=demo
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE ./
COPY examples ./examples
COPY server ./server
COPY token_swarm ./token_swarm
RUN pip install --constraint constraints.txt ".${EXTRAS:+[${EXTRAS}]}"
# An install without kernels works, ten times slower: here it is an error. Not in /src, where Python would find the
# sources instead of what was installed.
WORKDIR /
RUN python -c "from token_swarm.kernels import describe; print(kernels := describe()); assert 'C++' in kernels['cpu']"

FROM python:${PYTHON_VERSION}-slim-bookworm

# A fixed number: Kubernetes checks runAsNonRoot and gives volumes to a group by number.
RUN groupadd --gid 10001 token-swarm \
    && useradd --uid 10001 --gid 10001 --home-dir /var/lib/token-swarm --create-home --shell /usr/sbin/nologin token-swarm
COPY --from=build /opt/token-swarm /opt/token-swarm
COPY deploy/particles /etc/token-swarm/particles
# HOME holds .cache (converted models, vocabularies, logs) and what the Hugging Face hub hands out.
ENV PATH=/opt/token-swarm/bin:$PATH HOME=/var/lib/token-swarm PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /var/lib/token-swarm
VOLUME /var/lib/token-swarm
EXPOSE 50061
# --alive: an engine restarts what is unhealthy, and a server that drains or waits for an expert must not be.
HEALTHCHECK --interval=30s --timeout=10s --start-period=600s CMD ["token-swarm", "health", "--alive"]
ENTRYPOINT ["token-swarm"]
CMD ["serve", "--config", "/etc/token-swarm/config/swarm.yaml"]
