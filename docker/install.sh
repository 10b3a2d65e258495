#!/bin/sh
# Fills an environment in the build stages of the images. It has no pip of its own: the builder's installs into it from outside.
#
#   install.sh empty               the bare environment
#   install.sh torch [INDEX_URL]   PyTorch's CPU build, alone; without an index: whatever pip finds by itself
#   install.sh libraries LOCK      a lock file, every package by its hash
#   install.sh code FOLDER...      our own packages, built here with the tools of build.txt, which stay out of the environment
#
# $VENV says where (default: /opt/venv). An image lays the environments of its stages, all made at that path, over each other.
set -eu

venv=${VENV:-/opt/venv}
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
[ -d "$venv" ] || python -m venv --without-pip "$venv"

install() {
    pip --python "$venv/bin/python" install --no-deps "$@"
}

step=$1
shift
case $step in
    empty) ;;
    torch)
        install ${1:+--index-url "$1"} torch==2.13.0
        # a quarter of it is for those who compile against it: headers, CMake files, protoc, its own tests
        cd "$venv"/lib/python3.*/site-packages/torch
        rm -rf include share/cmake test
        find bin -type f ! -name torch_shm_manager -delete
        ;;
    libraries) install --require-hashes --only-binary :all: -r "$1" ;;
    code)
        pip install --no-deps --require-hashes -r /build.txt
        pip wheel --no-deps --no-index --no-build-isolation --wheel-dir /tmp/built "$@"
        install --no-index /tmp/built/*.whl
        ;;
    *)
        echo "install.sh: no step called $step" >&2
        exit 2
        ;;
esac
