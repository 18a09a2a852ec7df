# docker build -t registry.example.com/sfed:latest .
# docker run --rm --gpus all --shm-size 16g -v "$PWD/runs:/workspace/runs" registry.example.com/sfed:latest
# The second line runs the embedded demo on all GPUs of the machine. Words after the image's name
# are torchrun's, for example: --standalone --nproc_per_node 8 -m sfed.train my.yaml
# More, and how it was tried: docs/cluster.md, "Container".

# Any image with Python >= 3.11 or with apt-get to install one. torch's wheels bring CUDA's libraries
# with them: what they need of the image is the hook by which the driver comes in.
ARG BASE_IMAGE=docker.io/nvidia/cuda:13.0.3-base-ubuntu24.04

FROM ${BASE_IMAGE} AS base
# hadolint ignore=DL3008
RUN if ! command -v python3; then \
        apt-get update \
        && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 \
        && rm -rf /var/lib/apt/lists/*; \
    fi

FROM base AS build
# hadolint ignore=DL3008
RUN if ! python3 -c "import ensurepip"; then \
        apt-get update \
        && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3-venv \
        && rm -rf /var/lib/apt/lists/*; \
    fi
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
# It sees nothing of the system's packages, so that torchrun is its own and finds the trainer.
RUN python3 -m venv /opt/sfed
ENV PATH=/opt/sfed/bin:${PATH}
WORKDIR /src
# What the trainer needs: a layer that lasts until one of these two files changes. DeepSpeed needs
# no compiler: its ops (optimizers, transformers, asynchronous files) have no part in ZeRO-3 without
# an optimizer, which is all that is used of it here, so none is built, neither now nor at run time.
COPY pyproject.toml constraints.txt ./
# Extras of pyproject.toml that the image should hold, such as "tensorboard wandb".
ARG EXTRAS=""
RUN python -c 'import sys, tomllib; \
        project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
        extras = project["optional-dependencies"]; \
        wanted = [line for extra in sys.argv[1].split() for line in extras[extra]]; \
        print(*project["dependencies"], *wanted, sep="\n")' "${EXTRAS}" > requirements.txt \
    && pip install -c constraints.txt -r requirements.txt
COPY README.md LICENSE ./
COPY sfed ./sfed
RUN pip install --no-deps .

FROM base AS runtime
# Triton compiles kernels on the machine that trains (train.kernels). Empty = an image without a
# compiler, on which these steps are computed by torch.
ARG COMPILER="gcc"
# hadolint ignore=DL3008
RUN if [ -n "${COMPILER}" ] && ! command -v gcc; then \
        apt-get update \
        && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
            gcc libc6-dev python3-dev \
        && rm -rf /var/lib/apt/lists/*; \
    fi
ARG UID=1000
ARG GID=1000
RUN install -d -o "${UID}" -g "${GID}" /workspace
COPY --from=build /opt/sfed /opt/sfed
# Caches of libraries are each container's own; models are worth a place on the volume. USER is what
# libraries ask for where the number has no name.
ENV PATH=/opt/sfed/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    USER=sfed \
    HF_HOME=/workspace/.cache/huggingface
# As a number, which Kubernetes can tell from root. Only /workspace and /tmp are written to.
USER ${UID}:${GID}
WORKDIR /workspace
# As a list: torchrun is process 1, so SIGTERM reaches it and the run ends in order.
ENTRYPOINT ["torchrun"]
CMD ["--standalone", "--nproc_per_node", "gpu", "-m", "sfed.train"]
