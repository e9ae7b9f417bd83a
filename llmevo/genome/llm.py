"""The genome's `llm:` section: which language model proposes, and what it may cost."""

from __future__ import annotations

import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from llmevo.genome.spec import Spec


class PriceSpec(Spec):
    """What a language model costs, in dollars for a million tokens. None is built in: prices change.

    Attributes:
        prompt: For tokens read.
        completion: For tokens written, reasoning included.
        cached: For tokens read that the endpoint had already; None for the price of `prompt`.
    """

    prompt: Annotated[float, Field(ge=0)]
    completion: Annotated[float, Field(ge=0)]
    cached: Annotated[float, Field(ge=0)] | None = None


class LLMSpec(Spec):
    """Which language model proposes, and what it may cost.

    Attributes:
        backend: `openai` for any OpenAI-compatible endpoint, `local` for a transformers model in this
            process, `auto` for the endpoint where the key or a base_url is there, else local.
        model: The endpoint's name of the model (openai).
        local_model: Path of a transformers model (local).
        base_url: Of the endpoint; None for OpenAI's own.
        api_key_env: Environment variable that holds the key. Keys are never read from a file.
        temperature: Of the sampling; None to leave it out of the request.
        max_tokens: Longest reply.
        timeout: Seconds for one attempt.
        attempts: Attempts at one request, the first included.
        mode: How the endpoint is made to answer in JSON: `json_schema`, `json_object_schema`, `json_object`
            or `text`; `auto` to find out with a few small requests, once a run.
        price: What tokens cost; None if unknown, and then dollars are unknown too.
        max_calls: Requests that the whole run may send, the failed ones included; None for no limit.
        max_total_tokens: Tokens that the whole run may read and write; None for no limit.
        max_usd: Dollars that the whole run may spend; needs `price`. None for no limit.
    """

    backend: Literal["auto", "openai", "local"] = "auto"
    model: str | None = None
    local_model: str | None = None
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 0.7
    max_tokens: Annotated[int, Field(ge=16)] = 2048
    timeout: Annotated[float, Field(gt=0)] = 120.0
    attempts: Annotated[int, Field(ge=1)] = 4
    mode: Literal["auto", "json_schema", "json_object_schema", "json_object", "text"] = "auto"
    price: PriceSpec | None = None
    max_calls: Annotated[int, Field(ge=0)] | None = None
    max_total_tokens: Annotated[int, Field(ge=0)] | None = None
    max_usd: Annotated[float, Field(ge=0)] | None = None

    @field_validator("api_key_env", mode="after")
    @classmethod
    def _a_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):  # it may be a key, so it is not repeated
            raise ValueError("must be the name of an environment variable; put the key into that variable")
        return value

    @field_validator("base_url", mode="after")
    @classmethod
    def _no_secret(cls, value: str | None) -> str | None:
        parts = urlsplit(value or "http://localhost")
        if parts.username or parts.password or parts.query:
            raise ValueError(
                "must hold neither a user, a password nor a query; give the key in `api_key_env`"
            )
        return value

    @model_validator(mode="after")
    def _priced(self) -> LLMSpec:
        if self.max_usd is not None and self.price is None and self.backend != "local":
            raise ValueError("`max_usd` must come with `price`, without which it could not be kept; add it")
        return self
