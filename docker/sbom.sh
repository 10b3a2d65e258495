#!/bin/sh
# Asks an image's interpreters what they hold and writes /sbom/<environment>.cdx.json; vLLM has an environment of its own.
#
# The tool lies in /opt/sbom; -I and -S keep what itself consists of apart from what it finds. It checks its result against the schema with
# compiled packages, so only where the image's Python is the one that it was installed for.
set -eu

run='import runpy, sys; sys.path.append("/opt/sbom/lib/python3.11/site-packages"); runpy.run_module("cyclonedx_py", run_name="__main__")'
check=--no-validate
if [ "$(python3 -c 'import sys; print(*sys.version_info[:2])')" = "3 11" ]; then
    check=--validate
fi
mkdir /sbom
for environment in /opt/venv /opt/vllm; do
    if [ -d $environment ]; then
        python3 -I -S -c "$run" environment $check --mc-type application --output-reproducible --output-format JSON \
            --output-file "/sbom/$(basename $environment).cdx.json" $environment/bin/python
    fi
done
