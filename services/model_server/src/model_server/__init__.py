"""Stage deploy and the supervisor that starts, watches and restarts `vllm serve`."""
