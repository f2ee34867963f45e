# One image for each service, by target: docker build --target telemetry -t railbus-telemetry .
#
# Every dependency comes by its hash from `locks/` (`make lock`), but torch, whose build differs from machine to machine.
# What changes seldom lies below what changes often: an edit of the code installs our own package anew, and neither the
# dependencies nor torch. Only `runner` carries torch, and stands last, because the classic builder builds every stage
# above its target. Both builders of Docker build this file; it needs no extension of either.

ARG PYTHON_IMAGE=python:3.11-slim-bookworm

# What builds packages. It stays out of the images, and so do its tools: they get what it has installed in a folder.
FROM ${PYTHON_IMAGE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
COPY locks/build.txt locks/
RUN pip install --require-hashes --requirement locks/build.txt
COPY locks/telemetry.txt locks/
RUN pip install --prefix=/dependencies --ignore-installed --no-build-isolation --require-hashes \
        --requirement locks/telemetry.txt

FROM build AS package
COPY pyproject.toml README.md LICENSE ./
COPY shared shared
COPY client client
COPY services services
RUN pip install --prefix=/package --ignore-installed --no-deps --no-build-isolation .

# What every service needs, without our code. `/tmp` is the home: it is the only place beside the volumes that can be
# written. The folders give the volumes that are mounted there their owner.
FROM ${PYTHON_IMAGE} AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore HOME=/tmp RAILBUS_ROOT=/learning
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin railbus \
    && mkdir -p /learning /deploy /data && chown 10001:10001 /learning /data && chmod 700 /data
WORKDIR /opt/railbus
COPY --from=build /dependencies /usr/local
STOPSIGNAL SIGTERM

FROM base AS telemetry
COPY --from=package /package /usr/local
USER 10001:10001
CMD ["python", "-m", "railbus_telemetry"]

FROM base AS dataloader
COPY locks/dataloader.txt locks/
RUN pip install --require-hashes --requirement locks/dataloader.txt
COPY --from=package /package /usr/local
USER 10001:10001
CMD ["python", "-m", "railbus_dataloader"]

FROM base AS device_manager
COPY locks/device_manager.txt locks/
RUN pip install --require-hashes --requirement locks/device_manager.txt
COPY --from=package /package /usr/local
USER 10001:10001
CMD ["python", "-m", "railbus_device_manager"]

# TORCH_INDEX names a package index with another build of torch: the one for CPUs is several GB smaller.
FROM base AS runner
COPY locks/runner.txt locks/
RUN pip install --require-hashes --requirement locks/runner.txt
ARG TORCH_INDEX=""
COPY constraints.txt ./
RUN pip install --constraint constraints.txt torch ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"}
COPY --from=package /package /usr/local
USER 10001:10001
CMD ["python", "-m", "railbus_runner"]
