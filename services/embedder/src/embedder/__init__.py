"""OpenAI-compatible /v1/embeddings over one small model."""
