"""The API in OpenAPI's terms."""

from __future__ import annotations

from typing import Any

from unweave.serving.question import LIMITS

__all__ = ["describe_api"]

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "string"}},
    "additionalProperties": False,
}
NUMBERS = {"type": "array", "items": {"type": ["number", "null"]}}
IDS = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
    "minItems": 1,
    "maxItems": LIMITS["tokens"],
}
TEXT = {"type": "string", "maxLength": LIMITS["characters"]}
NAME = {"type": "string", "maxLength": LIMITS["name_characters"]}
REFUSALS = {
    400: "the body is not JSON",
    408: "the body came too slowly",
    413: "the body is too large",
    415: "the body is not announced as JSON",
    422: "the request asks for something that is not there",
    503: "another text is being run",
}


def _json(schema: dict[str, Any], what: str) -> dict[str, Any]:
    return {"description": what, "content": {"application/json": {"schema": schema}}}


def _question() -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "oneOf": [{"required": ["text"]}, {"required": ["tokens"]}],
        "properties": {
            "text": {**TEXT, "description": "the text; without a tokenizer, token ids separated by spaces"},
            "tokens": {**IDS, "description": "token ids, instead"},
            "ablate": {"type": "array", "items": NAME, "maxItems": LIMITS["ablations"]},
            "positions": {"anyOf": [IDS, {"type": "null"}]},
            "node": {"anyOf": [NAME, {"type": "null"}]},
            "measure": {"type": "boolean"},
            "counterfactual": {"anyOf": [TEXT, IDS, {"type": "null"}]},
        },
    }


def _answer() -> dict[str, Any]:
    token = {"type": "object", "required": ["id", "text"]}
    run = {"type": "object", "required": ["graph", "ablated", "against", "kl_nats"]}
    guess = {"type": "object", "required": ["id", "text", "p"], "properties": {"p": NUMBERS}}
    graph = {"type": "object", "required": ["use", "edges", "pattern", "measured"]}
    return {
        "type": "object",
        "required": ["tokens", "runs", "predictions", "graphs"],
        "properties": {
            "tokens": {"type": "array", "items": token},
            "runs": {"type": "array", "items": run},
            "predictions": {"type": "array", "items": {"type": "array", "items": guess}},
            "graphs": {"type": "array", "items": graph},
        },
    }


def describe_api(version: str) -> dict[str, Any]:
    """The OpenAPI 3.1 document of the served API.

    Example:
        >>> sorted(describe_api("0")["paths"])
        ['/api/graph', '/api/run', '/api/texts']
    """
    graph = {"type": "object", "required": ["graphs", "limits", "tokenizer", "means_over"]}
    texts = {"type": "object", "required": ["texts"], "properties": {"texts": {"type": "array", "items": TEXT}}}
    run = {
        "summary": "Run a text, with and without ablations",
        "requestBody": {"required": True, "content": {"application/json": {"schema": _question()}}},
        "responses": {"200": _json(_answer(), "predictions, use per token, divergences in nats")}
        | {str(status): _json(ERROR, what) for status, what in REFUSALS.items()},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "unweave serve", "version": version},
        "paths": {
            "/api/graph": {"get": {"summary": "The graphs", "responses": {"200": _json(graph, "nodes and results")}}},
            "/api/texts": {"get": {"summary": "Example texts", "responses": {"200": _json(texts, "texts")}}},
            "/api/run": {"post": run},
        },
    }
