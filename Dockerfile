# syntax=docker/dockerfile:1
# The daemon in a container: not root, and the root file system may be read-only (with a tmpfs for /tmp).
#
#   docker build -t cdc .
#   docker run --read-only --tmpfs /tmp -v cdc:/var/lib/cdc -v ./cdc.toml:/etc/cdc/cdc.toml:ro cdc
#
# deploy/compose.yaml brings it up with databases, Prometheus and Grafana.
ARG PYTHON=3.13

FROM python:${PYTHON}-slim-trixie AS build
# a compiler, for what is done for every row; any release of it will do
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY pyproject.toml constraints.txt README.md LICENSE cli.py ./
COPY cdc cdc
COPY sinks sinks
RUN python -m venv --without-pip /opt/cdc \
    && python -m pip --python /opt/cdc install --no-cache-dir --constraint constraints.txt . \
    && /opt/cdc/bin/python -c "import cdc._packed, cdc.mongodb._events, cdc.postgres._frames"

FROM python:${PYTHON}-slim-trixie
# pg_dump must not be older than the source's server: from PostgreSQL's own packages, whose key Debian has
ARG POSTGRES_CLIENT=18
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates postgresql-common \
    && /usr/share/postgresql-common/pgdg/apt.postgresql.org.sh -y \
    && apt-get install --yes --no-install-recommends "postgresql-client-${POSTGRES_CLIENT}" \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --system --gid 10001 cdc \
    && useradd --system --uid 10001 --gid cdc --home-dir /var/lib/cdc --no-create-home --shell /usr/sbin/nologin cdc \
    && install --directory --owner cdc --group cdc --mode 700 /var/lib/cdc
COPY --from=build /opt/cdc /opt/cdc
ENV PATH=/opt/cdc/bin:/usr/lib/postgresql/${POSTGRES_CLIENT}/bin:$PATH \
    CDC_CONFIG=/etc/cdc/cdc.toml \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /var/lib/cdc
USER 10001:10001
VOLUME /var/lib/cdc
EXPOSE 8642
# alive, not healthy: a database that is away is no reason to start the daemon again
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8642/health', timeout=4)"]
ENTRYPOINT ["cdc"]
CMD ["run"]
