"""Is the model that vLLM serves the one that was evaluated? Measured through the server's own API, before an alias moves."""
