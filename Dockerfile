# One image for each service, by target: docker build --target telemetry -t railbus-telemetry .
#
# What changes seldom lies below what changes often: an edit of the code installs one small wheel anew, and neither the
# dependencies nor torch. Only `runner` carries torch, and stands last, because the classic builder builds every stage
# above its target.

ARG PYTHON_IMAGE=python:3.11-slim-bookworm

# What every service needs, without our code. The folders give the volumes mounted there their owner.
FROM ${PYTHON_IMAGE} AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin railbus \
    && mkdir -p /learning /deploy /data && chown 10001:10001 /learning /deploy /data && chmod 700 /deploy /data
WORKDIR /opt/railbus
COPY constraints.txt pyproject.toml ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > dependencies.txt \
    && pip install --constraint constraints.txt --requirement dependencies.txt

FROM base AS wheel
COPY README.md LICENSE ./
COPY shared shared
COPY client client
COPY services services
RUN pip wheel --no-deps --wheel-dir /wheel .

# `/tmp` is the home: it is the only place beside the volumes that can be written.
FROM base AS code
COPY --from=wheel /wheel /wheel
RUN pip install --no-deps /wheel/*.whl
ENV HOME=/tmp RAILBUS_ROOT=/learning
USER 10001:10001
STOPSIGNAL SIGTERM

FROM code AS telemetry
CMD ["python", "-m", "railbus_telemetry"]

FROM base AS dataloader
RUN pip install --constraint constraints.txt obstore
COPY --from=wheel /wheel /wheel
RUN pip install --no-deps /wheel/*.whl
ENV HOME=/tmp RAILBUS_ROOT=/learning
USER 10001:10001
STOPSIGNAL SIGTERM
CMD ["python", "-m", "railbus_dataloader"]

FROM base AS device_manager
RUN pip install --constraint constraints.txt nvidia-ml-py
COPY --from=wheel /wheel /wheel
RUN pip install --no-deps /wheel/*.whl
ENV HOME=/tmp RAILBUS_ROOT=/learning
USER 10001:10001
STOPSIGNAL SIGTERM
CMD ["python", "-m", "railbus_device_manager"]

# TORCH_INDEX names a package index with another build of torch: the one for CPUs is several GB smaller.
FROM base AS runner
ARG TORCH_INDEX=""
RUN pip install --constraint constraints.txt torch ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"}
COPY --from=wheel /wheel /wheel
RUN pip install --no-deps /wheel/*.whl
ENV HOME=/tmp RAILBUS_ROOT=/learning
USER 10001:10001
STOPSIGNAL SIGTERM
CMD ["python", "-m", "railbus_runner"]
