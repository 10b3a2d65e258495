"""What the gateway counts. Label values are only names the platform itself gave out, so nobody can grow a metric at will."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

REQUESTS = Counter("parampara_gateway_requests", "Requests by route and status; 499: the client went away.", ["route", "status"])
SECONDS = Histogram("parampara_gateway_request_seconds", "Until the whole answer was sent.", ["route"], buckets=_SECONDS)
FIRST_TOKEN = Histogram("parampara_gateway_first_token_seconds", "From request to the first streamed token.", ["model"], buckets=_SECONDS)
TOKENS = Counter("parampara_gateway_tokens", "Tokens that the model server counted.", ["model", "direction"])
RETRIEVAL = Histogram("parampara_gateway_retrieval_seconds", "Embedding the question and searching the vector store.", buckets=_SECONDS)
PASSAGES = Histogram("parampara_gateway_passages", "Passages laid before the model.", buckets=(0, 1, 2, 3, 4, 6, 8, 12, 20, 50))
CITATIONS = Counter("parampara_gateway_citations", "Citations by who made them.", ["attributed_by"])
DISCONNECTS = Counter("parampara_gateway_client_disconnects", "Requests whose client went away before the answer was complete.")
INFLIGHT = Gauge("parampara_gateway_inflight", "Requests on the token path now.")
SNAPSHOT_AGE = Gauge("parampara_gateway_snapshot_age_seconds", "Age of the copy of keys, aliases and attachments.")
