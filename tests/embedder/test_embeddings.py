"""The embedder over HTTP with its real model and the real OpenAI SDK."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import numpy
import openai
import pytest
from fastapi.testclient import TestClient

from embedder.app import create_app
from embedder.model import SentenceEncoder, bundled_model_dir
from parampara.errors import InvalidRequest
from parampara.settings import Settings

MODEL = "all-minilm-l6-v2"


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(create_app(Settings()), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def encoder() -> SentenceEncoder:
    return SentenceEncoder(bundled_model_dir())


def embed(client: TestClient, **body: object) -> numpy.ndarray:
    response = client.post("/v1/embeddings", json={"model": MODEL, **body})
    assert response.status_code == 200, response.text
    return numpy.array([item["embedding"] for item in response.json()["data"]])


def test_near_meanings_are_near(client: TestClient) -> None:
    house, dwelling, engine = embed(client, input=["The house of marriage", "the home of wedlock", "A diesel engine needs oil"])
    assert house @ dwelling > 0.6 > 0.2 > house @ engine


def test_vectors_have_unit_length_and_the_usage_counts_tokens(client: TestClient) -> None:
    response = client.post("/v1/embeddings", json={"model": MODEL, "input": "sub lord"})
    body = response.json()
    assert abs(numpy.linalg.norm(body["data"][0]["embedding"]) - 1) < 1e-5
    assert body["usage"] == {"prompt_tokens": 2, "total_tokens": 2}
    assert (body["object"], body["model"], body["data"][0]["index"]) == ("list", MODEL, 0)


def test_base64_is_the_same_vector(client: TestClient) -> None:
    plain = embed(client, input="Rahu")[0]
    response = client.post("/v1/embeddings", json={"model": MODEL, "input": "Rahu", "encoding_format": "base64"})
    packed = numpy.frombuffer(base64.b64decode(response.json()["data"][0]["embedding"]), dtype="<f4")
    assert numpy.abs(packed - plain).max() < 1e-6


def test_a_batch_gives_what_each_text_gives_alone(client: TestClient) -> None:
    texts = ["Moon", "The Moon in the fourth house of the chart, aspected by Saturn", "x"]
    together = embed(client, input=texts)
    alone = numpy.concatenate([embed(client, input=text) for text in texts])
    assert numpy.abs(together - alone).max() < 1e-5


def test_agrees_with_the_reference_pooling(encoder: SentenceEncoder) -> None:
    """Mean over the attention mask, then unit length, as the model's own card computes it."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    text = "Saturn rules Pushya, Anuradha and Uttara Bhadrapada."
    directory = bundled_model_dir()
    tokens = AutoTokenizer.from_pretrained(directory)(text, return_tensors="pt")
    with torch.inference_mode():
        states = AutoModel.from_pretrained(directory)(**tokens).last_hidden_state
    expected = torch.nn.functional.normalize(states[0].mean(dim=0), dim=0)
    assert (encoder.encode(encoder.tokenize([text]))[0] - expected).abs().max() < 1e-5


def test_a_long_text_is_embedded_whole_not_cut(encoder: SentenceEncoder) -> None:
    filler = "The weather report of the day says nothing of interest. " * 60
    tail = "Ketu rules Ashwini, Magha and Mula for seven years. " * 60
    cut, whole, other = encoder.encode(encoder.tokenize([filler, filler + tail, tail]))
    assert whole @ other > cut @ other + 0.2
    assert encoder.window == 256


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"input": []}, 400, "input"),
        ({"input": ""}, 400, "input"),
        ({"input": [[1, 2, 3]]}, 400, "input[0]"),
        ({"input": ["a", 3]}, 400, "input[1]"),
        ({"input": ["a"] * 2049}, 400, "input"),
        ({"dimensions": 128}, 400, "dimensions"),
        ({"encoding_format": "hex"}, 400, "encoding_format"),
        ({"truncate": True}, 400, "truncate"),
        ({"model": "other"}, 404, "model"),
        ({"input": "word " * 65_537}, 400, "input"),
    ],
)
def test_a_bad_request_names_its_field(client: TestClient, change: dict[str, object], status: int, param: str) -> None:
    response = client.post("/v1/embeddings", json={"model": MODEL, "input": "a", **change})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), error
    assert set(error) == {"message", "type", "param", "code"}


def test_the_right_dimensions_are_accepted(client: TestClient) -> None:
    assert embed(client, input="a", dimensions=384).shape == (1, 384)


def test_health_models_and_metrics(client: TestClient) -> None:
    assert client.get("/health").json() == {"status": "ok", "model": MODEL, "dimensions": 384, "window": 256}
    assert client.get("/readyz").status_code == client.get("/livez").status_code == client.get("/docs").status_code == 200
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == [MODEL]
    embed(client, input="count me")
    assert "parampara_embedder_tokens_total" in client.get("/metrics", follow_redirects=False).text
    assert client.get("/nothing").json()["error"]["code"] == "unknown_url"


def test_the_openai_sdk(client: TestClient) -> None:
    options: dict[str, Any] = {"base_url": "http://testserver/v1", "api_key": "x", "http_client": _through(client), "max_retries": 0}
    packed = openai.OpenAI(**options).embeddings.create(model=MODEL, input=["one", "two"])  # asks for base64 by itself
    assert [len(item.embedding) for item in packed.data] == [384, 384]
    strict = openai.OpenAI(**options, _strict_response_validation=True)
    plain = strict.embeddings.create(model=MODEL, input=["one", "two"], encoding_format="float")
    assert abs(plain.data[1].embedding[0] - packed.data[1].embedding[0]) < 1e-6
    assert strict.models.list().data[0].id == MODEL


def _through(client: TestClient) -> Any:
    """An HTTP client of the kind that the SDK wants, whose requests end in the application."""
    import httpx2

    def handle(request: httpx2.Request) -> httpx2.Response:
        answer = client.request(request.method, str(request.url), content=request.read(), headers=dict(request.headers))
        return httpx2.Response(answer.status_code, content=answer.content, headers={"content-type": answer.headers["content-type"]})

    return httpx2.Client(transport=httpx2.MockTransport(handle))


@pytest.mark.parametrize(("name", "value"), [("model", "no-such-model"), ("dimensions", 1024)])
def test_a_model_that_is_not_here_is_refused_at_start(name: str, value: object) -> None:
    settings = Settings()
    settings.embedder = settings.embedder.model_copy(update={name: value})
    with pytest.raises(InvalidRequest, match=rf"PARAMPARA_EMBEDDER__{name.upper()} is {value!r}.*PARAMPARA_GATEWAY__EMBEDDER_URL"):
        create_app(settings)
