# realera-fast on a CPU:
#   docker build -t realera-fast .
#   docker run --rm -v "$PWD/out:/work" realera-fast erase embedded -c rabbit --out no-rabbit
FROM python:3.12-slim AS torch
# The CPU build: pip's default is gigabytes of CUDA.
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu

FROM torch AS wheel
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM torch
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir /wheels/*.whl
RUN useradd --uid 1000 --create-home eraser && install --directory --owner=eraser /work
USER 1000
WORKDIR /work
# Models come from folders; nothing is downloaded.
ENV HF_HUB_OFFLINE=1
ENTRYPOINT ["realera-fast"]
CMD ["--help"]
