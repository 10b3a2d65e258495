"""The one public base URL: OpenAI-compatible API with retrieval and citations."""
