# base: Python and the pinned dependencies. wheel: this repository as a wheel. pretrain: both, and nothing else.
# Other images start from pretrain. Build: make images

ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS base
ENV SWAV_CACHE=/tmp/swav-cache PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
COPY pyproject.toml constraints.txt ./
# Dependencies alone, so that a change of the code does not install them again.
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
      print(*project['dependencies'], *project['optional-dependencies']['train'], sep='\n')" > requirements.txt \
    && python -m pip install --requirement requirements.txt --constraint constraints.txt \
    && rm requirements.txt

FROM base AS wheel
COPY LICENSE README.md ./
COPY swav swav
COPY eval eval
COPY components components
RUN PIP_CONSTRAINT=constraints.txt python -m pip wheel --no-deps --wheel-dir /wheels .

FROM base AS pretrain
COPY --from=wheel /wheels /wheels
RUN python -m pip install --no-deps /wheels/*.whl && rm -r /wheels /build \
    && useradd --uid 10001 --user-group --create-home swav
WORKDIR /home/swav
USER 10001:10001
CMD ["python", "-m", "swav.pretrain", "--help"]
