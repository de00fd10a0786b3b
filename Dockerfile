# python (an environment, a user without rights) -> torch -> base (all other packages) -> pretrain; wheel: this repository.
# Build all images: make images. Build arguments, mirrors, the CPU variant: docs/images.md.

ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS python
# No VISIBLE_DEVICES: a pod sees the GPUs that it asked for. HOME is what a read-only root leaves writable.
ENV PATH=/opt/swav/bin:${PATH} LANG=C.UTF-8 HOME=/tmp SWAV_CACHE=/tmp/swav-cache \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
# Bytecode is in the image (Python's own images have none of the standard library), as nothing can be written at run
# time; nothing needs the rights of another user.
RUN python -m venv --without-pip /opt/swav \
    && python -m compileall -q "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" \
    && useradd --uid 10001 --user-group --no-create-home --home-dir /home/swav --shell /usr/sbin/nologin swav \
    && find / -xdev -type f -perm /6000 -exec chmod a-s {} +
COPY images/process-one.pth /opt/swav/lib/python3.11/site-packages/
WORKDIR /home/swav

FROM python AS torch
ARG VARIANT=cuda
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=bind,source=images/locks/torch.txt,target=/locks/torch.txt \
    --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    case "${VARIANT}" in \
      cuda) pip --python /opt/swav/bin/python install --no-deps --require-hashes --requirement /locks/torch.txt ;; \
      cpu) sed -nE 's/^(torch|torchvision)==([0-9.]+).*/\1==\2+cpu/p' /locks/torch.txt > /tmp/torch-cpu.txt \
        && pip --python /opt/swav/bin/python install --no-deps --index-url "${TORCH_INDEX}" --requirement /tmp/torch-cpu.txt \
        && rm /tmp/torch-cpu.txt ;; \
      *) echo "VARIANT=${VARIANT} is neither cuda nor cpu" >&2; exit 1 ;; \
    esac

FROM torch AS base
RUN --mount=type=bind,source=images/locks/train.txt,target=/locks/train.txt \
    --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    pip --python /opt/swav/bin/python install --no-deps --require-hashes --requirement /locks/train.txt

FROM python AS tools
RUN --mount=type=bind,source=images/locks/build.txt,target=/locks/build.txt \
    --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    python -m venv --without-pip /opt/tools \
    && pip --python /opt/tools/bin/python install --no-deps --require-hashes --requirement /locks/build.txt

FROM tools AS wheel
WORKDIR /build
COPY pyproject.toml LICENSE README.md ./
COPY swav swav
COPY eval eval
COPY components components
RUN pip --python /opt/tools/bin/python wheel --no-deps --no-build-isolation --no-index --wheel-dir /wheels .

FROM base AS installed
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip --python /opt/swav/bin/python install --no-deps --no-index /wheels/*.whl \
    && pip --python /opt/swav/bin/python check

FROM installed AS sbom
COPY --from=tools /opt/tools /opt/tools
RUN mkdir /sbom && /opt/tools/bin/cyclonedx-py environment --output-reproducible --output-format JSON \
      --output-file /sbom/swav.cdx.json /opt/swav/bin/python

FROM installed AS pretrain
COPY --from=sbom /sbom /usr/share/sbom
USER 10001:10001
CMD ["python", "-m", "swav.pretrain", "--help"]
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=unknown
ARG SOURCE=unknown
LABEL org.opencontainers.image.title="swav-pretrain" \
      org.opencontainers.image.description="SwAV pretraining of vision backbones from shards in object storage" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.source="${SOURCE}"
