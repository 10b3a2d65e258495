#!/bin/sh
# What root does in the last stage of every image, then nobody is root any more: runtime.sh [--keep-installers] [DEBIAN_PACKAGE...]
#
# - tini becomes PID 1: it passes signals on and reaps what stage processes leave behind, whoever runs the container;
# - the user and the folders that volumes are mounted on, so that new volumes belong to that user;
# - no installer of Python packages stays, unless the base image's own programs import it (--keep-installers).
set -eu

keep=false
if [ "${1:-}" = --keep-installers ]; then
    keep=true
    shift
fi

apt-get update
apt-get install -y --no-install-recommends tini "$@"
rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log

groupadd --gid 10001 parampara
useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/parampara --shell /usr/sbin/nologin parampara
for folder in "" /artifacts /files /work; do
    install -d -o 10001 -g 10001 "/var/lib/parampara$folder"
done

if [ "$keep" = false ]; then
    python -m pip uninstall --yes --quiet --root-user-action ignore setuptools wheel pip
    rm -rf "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')/ensurepip" /usr/share/python-wheels
fi
