"""Checks of rendered Kubernetes manifests, run by ``scripts/k8s_check.py``. Each returns faults as sentences; none when all is well."""
