"""OpenAI's vector stores: routes, what they do to the rows, and the wire form of both."""
