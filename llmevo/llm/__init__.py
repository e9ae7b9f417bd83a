"""Chat clients: one request in, one reply out, behind one Protocol.

A client wraps one language model: `llm.openai.OpenAIChat` any OpenAI-compatible endpoint,
`llm.local.LocalChat` a transformers model in this process. What is asked and what is made of the answer
lies in `llm.prompt`, `llm.encode` and `llm.decode`; who asks is `proposers.llm`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, final, runtime_checkable

from llmevo.errors import LLMError

if TYPE_CHECKING:
    from llmevo.genome import LLMSpec
    from llmevo.llm.ledger import Ledger

Message: TypeAlias = Mapping[str, str]

# How an endpoint may enforce a schema, the strictest first.
MODES = ("json_schema", "json_object_schema", "json_object", "text")


@final
@dataclass(frozen=True, slots=True)
class Request:
    """What a client is asked.

    Args:
        messages: Each with `role` (`system` or `user`) and `content`.
        schema: JSON schema that the reply must fulfil, or None for free text. It may hold bounds; a client
            sends only what its model's endpoint is known to take.
        temperature: Of the sampling; None for the client's own.
        max_tokens: Longest reply; None for the client's own.
        seed: Of the sampling, at least 0; an endpoint may ignore it.
        name: What the call is for, in `[a-zA-Z0-9_-]`; becomes the schema's name.
        mode: The one way to enforce the schema that is to be tried, of `Reply.mode`; None for the client's
            choice.
    """

    messages: tuple[Message, ...]
    schema: Mapping[str, Any] | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    name: str = "reply"
    mode: str | None = None


@final
@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one call; None where the endpoint does not say.

    Args:
        prompt: Tokens read.
        completion: Tokens written, reasoning included.
        reasoning: Of `completion`, those not shown.
        cached: Of `prompt`, those that the endpoint had already.
    """

    prompt: int | None = None
    completion: int | None = None
    reasoning: int | None = None
    cached: int | None = None


@final
@dataclass(frozen=True, slots=True)
class Attempt:
    """One request on the wire.

    Args:
        outcome: `ok`, or what went wrong in one short line, without the key.
        seconds: Wall time of the request.
        status: HTTP status; None if there was no answer or no HTTP.
        waited: Seconds of waiting before it.
    """

    outcome: str
    seconds: float
    status: int | None = None
    waited: float = 0.0


@final
@dataclass(frozen=True, slots=True)
class Reply:
    """What a client answered; it may be useless, which is for the caller to find out.

    Args:
        text: The answer; empty if the model gave none.
        finish_reason: `stop`; `length` if it was cut off; `empty`, `refusal`, `content_filter`, `malformed`
            or `context` (the prompt does not fit) if there is nothing to use.
        usage: Tokens, as far as known.
        model: The model's name as the endpoint gives it.
        seconds: Wall time of the call, waiting included.
        attempts: Every request made for it, in order, the refused ones included.
        mode: How the schema was enforced: `json_schema`, `json_object_schema`, `json_object`, `text`,
            `grammar` (local), or `none` without a schema.
    """

    text: str
    finish_reason: str = "stop"
    usage: Usage = Usage()
    model: str = ""
    seconds: float = 0.0
    attempts: tuple[Attempt, ...] = ()
    mode: str = "none"


class ChatClient(Protocol):
    """One language model.

    A client may also have `small: bool`, true for models under 1B parameters, which get a compact prompt; and
    `describe() -> str`, one line for people.
    """

    def complete(self, request: Request) -> Reply:
        """Ask the model once.

        Raises:
            LLMError: The endpoint could not be reached, refused the key or the request, or is out of quota.
        """
        ...


class DescribedClient(ChatClient, Protocol):
    """A client that can say what it is."""

    @property
    def small(self) -> bool:
        """Whether the model is known to have under 1B parameters."""
        ...

    def describe(self) -> str:
        """One line: which model, where, and why this one."""
        ...


@runtime_checkable
class Endpoint(DescribedClient, Protocol):
    """A client whose model is elsewhere, and whose way to enforce a schema has to be found out."""

    model: str
    base_url: str

    def enforce(self, mode: str) -> None:
        """Begin with this mode of `MODES` from now on."""
        ...


def client_from(spec: LLMSpec, ledger: Ledger | None = None) -> DescribedClient:
    """The client that a genome's `llm:` section asks for.

    `auto` takes the endpoint when `model` is named and there is a `base_url` or the key; a key alone is not
    taken as the wish to spend money, and then the local model is used. `describe()` says which it is and why.

    Args:
        spec: The section.
        ledger: Counts the endpoint's requests and keeps their limits; None for no count and no limits.

    Raises:
        LLMError: No model is named for the endpoint, the key's environment variable is empty, or there is no
            local model.
    """
    wanted = spec.backend
    reason = f"llm.backend is {wanted}"
    if wanted == "auto":
        key = bool(os.environ.get(spec.api_key_env))
        if spec.base_url is not None or (key and spec.model is not None):
            wanted = "openai"
            reason = "llm.base_url is given" if spec.base_url else f"${spec.api_key_env} is set"
        else:
            wanted = "local"
            reason = "llm.model names none" if key else f"neither llm.base_url nor ${spec.api_key_env} is set"
    if wanted == "openai":
        from llmevo.llm.openai import OpenAIChat

        if spec.model is None:
            raise LLMError("`llm.model` must name the endpoint's model, but is not given; add it.")
        return OpenAIChat(
            spec.model,
            base_url=spec.base_url,
            api_key_env=spec.api_key_env,
            # A variable named on purpose must be there; the default one need not be for a local server.
            key_required="api_key_env" in spec.model_fields_set or None,
            temperature=spec.temperature,
            max_tokens=spec.max_tokens,
            timeout=spec.timeout,
            attempts=spec.attempts,
            ledger=ledger,
            mode=MODES[0] if spec.mode == "auto" else spec.mode,
            reason=reason,
        )
    from llmevo.llm.ledger import Price
    from llmevo.llm.local import LocalChat

    if ledger is not None:
        ledger.price = Price(0.0, 0.0)  # nobody is paid for what this machine computes
    return LocalChat(
        spec.local_model, temperature=spec.temperature, max_tokens=spec.max_tokens, reason=reason
    )
