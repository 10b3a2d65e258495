# Bill of materials of an image that was built: the Python packages that really lie in it, as CycloneDX.
# Called by `make sbom`: docker build -f docker/sbom.Dockerfile --build-arg IMAGE=parampara/gateway --target sbom --output sbom/gateway .

ARG IMAGE

FROM python:3.11-slim-bookworm AS tool
ENV VENV=/opt/sbom
COPY docker/sbom.txt /requirements.txt
RUN --mount=type=bind,source=docker/install.sh,target=/install.sh \
    --mount=type=cache,target=/root/.cache/pip \
    sh /install.sh libraries /requirements.txt

# The tool asks the image's own interpreters what they hold. vLLM has an environment of its own.
FROM ${IMAGE} AS image
USER root
ARG NAME
ARG VERSION=0.1.0
RUN --mount=type=bind,from=tool,source=/,target=/tool \
    mkdir /sbom \
    && for environment in /opt/venv /opt/vllm; do \
        [ -d $environment ] || continue; \
        PYTHONPATH=/tool/opt/sbom/lib/python3.11/site-packages python3 -m cyclonedx_py environment \
            --mc-type application --output-reproducible --output-format JSON \
            --output-file /sbom/$(basename $environment).cdx.json $environment/bin/python || exit 1; \
    done

FROM scratch AS sbom
COPY --from=image /sbom /
