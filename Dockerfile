# The images of the services, one target each: gate, registry, evaluator, evaluator-gpu. docs/images.md shows how to
# build them.
#
# Base images are pinned by their full tag. To pin one by content too, run `docker buildx imagetools inspect <image>`
# and append its digest: FROM <image>@sha256:<digest>.

FROM python:3.11.15-slim-bookworm AS base
# Write no .pyc files beside the code, and import no module from the working directory.
ENV PATH=/opt/atserving/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONSAFEPATH=1

# uv, which builds and installs everything else, and setuptools.
FROM base AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore \
    UV_COMPILE_BYTECODE=1 \
    UV_LINK_MODE=copy \
    UV_NO_CACHE=1 \
    UV_PYTHON_DOWNLOADS=never
WORKDIR /opt/source
COPY docker/build.txt docker/
RUN pip install --require-hashes --only-binary :all: --requirement docker/build.txt

# The project's wheel, which all images share. .dockerignore selects the files that it is built from.
FROM build AS wheel
COPY . .
RUN uv build --python python --no-build-isolation --wheel --out-dir /opt/wheels .

# The packages of gate and registry. The build stage's uv installs them, so the environment itself has no installer.
FROM build AS core-packages
COPY docker/core.txt docker/
RUN python -m venv --without-pip /opt/atserving \
    && uv pip install --python /opt/atserving/bin/python --require-hashes --only-binary :all: --requirement docker/core.txt \
    && rm /opt/atserving/.lock

# The packages of the evaluator on a CPU.
FROM build AS cpu-packages
COPY docker/cpu.txt docker/
RUN python -m venv --without-pip /opt/atserving \
    && uv pip install --python /opt/atserving/bin/python --require-hashes --only-binary :all: --requirement docker/cpu.txt \
    && rm /opt/atserving/.lock

# The project in a prefix of its own: a change of code then changes only one small layer.
FROM core-packages AS project
COPY --from=wheel /opt/wheels /opt/wheels
RUN uv pip install --python /opt/atserving/bin/python --no-deps --prefix /opt/project /opt/wheels/*.whl \
    && rm /opt/project/.lock

FROM base AS service
LABEL org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.vendor="AtServing"
COPY --from=core-packages /opt/atserving /opt/atserving
COPY --from=project /opt/project /opt/atserving
USER 10001:10001

FROM service AS gate
LABEL org.opencontainers.image.title="AtServing gate" \
      org.opencontainers.image.description="Routes evals by app and version to the evaluators that serve them"
ENV ATSERVING_LISTEN=0.0.0.0:50051 \
    ATSERVING_HTTP=0.0.0.0:9090
EXPOSE 50051 9090
ENTRYPOINT ["python", "-m", "gate"]

FROM service AS registry
LABEL org.opencontainers.image.title="AtServing registry" \
      org.opencontainers.image.description="Mirrors release config and instances from etcd, and publishes releases"
ENV ATSERVING_LISTEN=0.0.0.0:50053 \
    ATSERVING_HTTP=0.0.0.0:9090
EXPOSE 50053 50054 9090
ENTRYPOINT ["python", "-m", "registry"]

FROM base AS evaluator
LABEL org.opencontainers.image.title="AtServing evaluator" \
      org.opencontainers.image.description="Serves one release of a Caffe network, on CPUs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.vendor="AtServing"
COPY --from=cpu-packages /opt/atserving /opt/atserving
COPY --from=project /opt/project /opt/atserving
USER 10001:10001
# Fixed ports for the image; by default the evaluator takes free ports and serves HTTP on localhost only.
ENV ATSERVING_LISTEN=0.0.0.0:50052 \
    ATSERVING_HTTP=0.0.0.0:9090
EXPOSE 50052 9090
ENTRYPOINT ["python", "-m", "evaluator"]

# The onnxruntime-gpu of docker/gpu.txt is built for CUDA 13 and cuDNN 9. Python 3.12 comes from Ubuntu, whose packages
# are not pinned, since the archive keeps only the newest version of each.
FROM nvidia/cuda:13.2.1-cudnn-runtime-ubuntu24.04 AS gpu-base
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/atserving/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONSAFEPATH=1

FROM gpu-base AS gpu-packages
ENV UV_COMPILE_BYTECODE=1 \
    UV_LINK_MODE=copy \
    UV_NO_CACHE=1 \
    UV_PYTHON_DOWNLOADS=never
WORKDIR /opt/source
COPY --from=build /usr/local/bin/uv /usr/local/bin/
COPY docker/gpu.txt docker/
RUN python3 -m venv --without-pip /opt/atserving \
    && uv pip install --python /opt/atserving/bin/python --require-hashes --only-binary :all: --requirement docker/gpu.txt \
    && rm /opt/atserving/.lock

FROM gpu-packages AS gpu-project
COPY --from=wheel /opt/wheels /opt/wheels
RUN uv pip install --python /opt/atserving/bin/python --no-deps --prefix /opt/project /opt/wheels/*.whl \
    && rm /opt/project/.lock

FROM gpu-base AS evaluator-gpu
LABEL org.opencontainers.image.title="AtServing evaluator for GPUs" \
      org.opencontainers.image.description="Serves one release of a Caffe network, on NVIDIA GPUs by CUDA" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.vendor="AtServing"
COPY --from=gpu-packages /opt/atserving /opt/atserving
COPY --from=gpu-project /opt/project /opt/atserving
USER 10001:10001
# CUDA caches the kernels that it compiles below CUDA_CACHE_PATH; the default, below HOME, is not writable.
ENV ATSERVING_LISTEN=0.0.0.0:50052 \
    ATSERVING_HTTP=0.0.0.0:9090 \
    CUDA_CACHE_PATH=/tmp/cuda
EXPOSE 50052 9090
ENTRYPOINT ["python", "-m", "evaluator"]
