# Bill of materials of an image that was built: the Python packages that really lie in it, as CycloneDX.
# Called by `make sbom`: docker build -f docker/sbom.Dockerfile --build-arg IMAGE=parampara/gateway --target sbom --output sbom/gateway .

ARG IMAGE

FROM python:3.11-slim-bookworm AS tool
ENV VENV=/opt/sbom
COPY docker/sbom.txt /requirements.txt
RUN --mount=type=bind,source=docker/install.sh,target=/install.sh \
    --mount=type=cache,target=/root/.cache/pip \
    sh /install.sh libraries /requirements.txt

FROM ${IMAGE} AS image
USER root
RUN --mount=type=bind,from=tool,source=/opt/sbom,target=/opt/sbom \
    --mount=type=bind,source=docker/sbom.sh,target=/sbom.sh \
    sh /sbom.sh

FROM scratch AS sbom
COPY --from=image /sbom /
