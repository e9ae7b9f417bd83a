"""Any OpenAI-compatible chat endpoint, through the `openai` package.

One retry layer: the package's own retries are off, since two layers multiply (its 2 and our 4 make 12
requests). Retried are exactly: no connection, timeout, rate limit, server error; but not an exhausted quota,
and not a server error that is a refused request in disguise (llama-cpp-python answers an unknown
`response_format` with status 500).

What an endpoint refuses is found out by asking, and remembered per client: the schema goes down the ladder
json_schema, json_object with a schema, json_object, text; `temperature` is dropped and `max_tokens` renamed
where a 400 says so.
"""

from __future__ import annotations

import email.utils
import math
import os
import re
import time
import weakref
from collections.abc import Mapping
from typing import Any, final
from urllib.parse import urlsplit

import openai
import tenacity

from llmevo.errors import LLMAuthError, LLMError, LLMQuotaError, LLMTransportError
from llmevo.llm import MODES, Attempt, Reply, Request, body, bounded
from llmevo.llm.ledger import Ledger
from llmevo.rundir import redact

_BOUNDS = frozenset(
    {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
    | {"minLength", "maxLength", "pattern", "minItems", "maxItems", "uniqueItems"}
)
_LENGTHS = frozenset({"minItems", "maxItems"})
_VALIDATION = re.compile(
    r"literal_error|validation|input should be|response_format|json_schema|extra_forbidden|grammar"
    r"|context.?(length|size|window)",
    re.I,
)
_CONTEXT = re.compile(r"context.?(length|size|window)", re.I)
# A refusal that no other response format would change.
_HOPELESS = re.compile(rf"api.?key|does not exist|model_not_found|{_CONTEXT.pattern}", re.I)
_KEY = re.compile(r"api.?key", re.I)  # Gemini's endpoint refuses a key with 400
_OFFICIAL = "https://api.openai.com/v1"


@final
class OpenAIChat:
    """A chat model behind an OpenAI-compatible HTTP endpoint.

    Args:
        model: The endpoint's name of the model.
        base_url: Of the endpoint, with its `/v1`; None for `$OPENAI_BASE_URL`, else OpenAI's own.
        api_key_env: Environment variable that holds the key; the key itself is never an argument.
        key_required: Whether an empty variable is an error; None: only for OpenAI's own endpoint.
        temperature: Of the sampling, in [0, 2]; None to leave it out.
        max_tokens: Longest reply.
        timeout: Seconds for one attempt.
        attempts: Attempts at one request, the first included; at least 1.
        deadline: Seconds for a whole call, waiting included: no attempt is started after it.
        backoff: Seconds of the first random wait; doubled each time up to 30.
        ledger: Is asked for room before each request and told what it took; None for no limits.
        mode: The strictest way to enforce a schema that is tried, of `MODES`.
        reason: Why this client was chosen, for `describe`.

    Raises:
        LLMAuthError: The key is missing.
    """

    small = False
    metered = True

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        key_required: bool | None = None,
        temperature: float | None = 0.7,
        max_tokens: int = 2048,
        timeout: float = 120.0,
        attempts: int = 4,
        deadline: float = 300.0,
        backoff: float = 0.5,
        ledger: Ledger | None = None,
        mode: str = MODES[0],
        reason: str = "",
    ) -> None:
        self.model = model
        self.base_url = base_url or os.environ.get("OPENAI_BASE_URL") or _OFFICIAL
        self._variable = api_key_env
        key = os.environ.get(api_key_env, "").strip()
        if key_required is None:
            key_required = self.base_url == _OFFICIAL
        if not key and key_required:
            raise LLMAuthError(
                f"the environment variable `{api_key_env}` must hold the key of {self._host}, but is empty; "
                f"set it, name another one in `llm.api_key_env`, or use `llm.backend: local`."
            )
        self._has_key = bool(key)
        self._temperature = temperature
        self._max_tokens = max_tokens
        self._timeout = timeout
        self._attempts = attempts
        self._deadline = max(deadline, timeout)
        self._backoff = tenacity.wait_random_exponential(multiplier=backoff, max=30.0)
        self._reason = reason
        self._ledger = ledger or Ledger()
        self._mode = MODES.index(mode)
        self._dropped: set[str] = set()
        # The key lives in the SDK's client alone; a server without keys takes any.
        http = bounded.client()
        weakref.finalize(self, http.close)  # the SDK closes only clients that it made
        self._client = openai.OpenAI(
            api_key=key or "none", base_url=self.base_url, max_retries=0, http_client=http
        )

    @property
    def _host(self) -> str:
        return urlsplit(self.base_url).hostname or self.base_url

    def __repr__(self) -> str:
        return f"OpenAIChat({self.model!r}, host={self._host!r})"

    def __getstate__(self) -> None:
        raise TypeError("an OpenAIChat holds a key and is not pickled; make one where it is used")

    def close(self) -> None:
        """Close the connections; the client cannot be used afterwards."""
        self._client.close()

    @property
    def identity(self) -> dict[str, Any]:
        """What an answer depends on beyond the request: the model and its settings, and the host."""
        return {
            "model": self.model,
            "host": self._host,
            "temperature": self._temperature,
            "max_tokens": self._max_tokens,
        }

    def enforce(self, mode: str) -> None:
        """Begin with this mode of `MODES` from now on; what the endpoint refuses still steps down."""
        self._mode = MODES.index(mode)

    def describe(self) -> str:
        """One line: which model, where, which key variable, and why."""
        key = f"key from ${self._variable}" if self._has_key else "no key"
        because = f" (because {self._reason})" if self._reason else ""
        return f"{self.model} at {self._host}, {key}{because}"

    def complete(self, request: Request) -> Reply:
        """Ask the model once; retries and the ladder happen inside.

        Raises:
            LLMTransportError: The endpoint could not be reached in time.
            LLMAuthError: It refused the key.
            LLMQuotaError: The account is out of quota.
            LLMBudgetError: The ledger has no room for a request.
            LLMError: It refused the request in every form.
        """
        call = _Call(time.monotonic(), [])
        modes = MODES[self._mode :] if request.schema is not None else ("none",)
        if request.mode is not None:
            modes = (request.mode,)
        first: openai.APIStatusError | None = None
        for mode in modes:
            answer = self._adapted(request, mode, call)
            if isinstance(answer, openai.APIStatusError) and _refused(answer):
                first = first or answer
                if not _HOPELESS.search(str(answer.body)):
                    continue
            if isinstance(answer, openai.OpenAIError):
                raise self._error(answer, call)  # outside any except block: no traceback holds the key
            if request.schema is not None and request.mode is None:
                self._mode = MODES.index(mode)
            reply = body.reply(answer, self.model, mode, call.elapsed(), call.attempts)
            self._ledger.settle(call.attempts[-1], reply.usage)
            return reply
        assert first is not None  # the loop only falls through on refusals
        raise self._error(first, call)

    def _adapted(self, request: Request, mode: str, call: _Call) -> str | openai.OpenAIError:
        """Send in one mode, without the parameters that this endpoint turns out to refuse."""
        while True:
            answer = self._retried(request, self._arguments(request, mode), call)
            if not (isinstance(answer, openai.APIStatusError) and answer.status_code in (400, 422)):
                return answer
            culprit = self._culprit(str(answer.body))
            if culprit is None:
                return answer
            self._dropped.add(culprit)  # each at most once, so this ends

    def _culprit(self, body: str) -> str | None:
        """The parameter that a refusal names, if we can do without it."""
        if "max_tokens" not in self._dropped and "max_completion_tokens" in body:
            return "max_tokens"
        for name in ("temperature", "seed"):
            named = re.search(
                rf"['\"`]{name}['\"`]|{name} (is )?not supported|unsupported.*{name}", body, re.I
            )
            if name not in self._dropped and named:
                return name
        return None

    def _arguments(self, request: Request, mode: str) -> dict[str, Any]:
        tokens = "max_completion_tokens" if "max_tokens" in self._dropped else "max_tokens"
        arguments: dict[str, Any] = {
            "model": self.model,
            "messages": [dict(message) for message in request.messages],
            tokens: request.max_tokens or self._max_tokens,
        }
        temperature = self._temperature if request.temperature is None else request.temperature
        if temperature is not None and "temperature" not in self._dropped:
            arguments["temperature"] = temperature
        if request.seed is not None and "seed" not in self._dropped:
            arguments["seed"] = request.seed
        if request.schema is not None:
            # Those who take a schema beside json_object are llama.cpp's kin, which keep the length of a list
            # and nothing else; a small model that may leave the list empty does.
            keep = _LENGTHS if mode == "json_object_schema" else frozenset()
            schema = unbounded(request.schema, keep)
            if mode == "json_schema":
                named = {"name": request.name, "strict": True, "schema": schema}
                arguments["response_format"] = {"type": "json_schema", "json_schema": named}
            elif mode == "json_object_schema":
                arguments["response_format"] = {"type": "json_object", "schema": schema}
            elif mode == "json_object":
                arguments["response_format"] = {"type": "json_object"}
        return arguments

    def _retried(self, request: Request, arguments: dict[str, Any], call: _Call) -> str | openai.OpenAIError:
        """The body of a 200, or the error after the last attempt; errors are returned, not raised."""
        left = self._deadline - call.elapsed()

        def once() -> str:
            remaining = max(self._deadline - call.elapsed(), 1e-3)
            self._ledger.reserve(request, request.max_tokens or self._max_tokens)
            started = time.monotonic()
            waited = max(call.elapsed() - call.busy(), 0.0)
            try:
                raw = self._client.chat.completions.with_raw_response.create(
                    **arguments, timeout=min(self._timeout, remaining)
                )
            except openai.OpenAIError as error:
                status = getattr(error, "status_code", None)
                spent = time.monotonic() - started
                call.attempts.append(Attempt(self._brief(error), spent, status, waited))
                self._ledger.settle(call.attempts[-1])
                raise
            call.attempts.append(Attempt("ok", time.monotonic() - started, raw.status_code, waited))
            return redact(raw.text, self._variable)  # a gateway may repeat what it was sent

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_retriable),
            wait=self._wait,
            stop=tenacity.stop_after_attempt(self._attempts) | tenacity.stop_before_delay(left),
            reraise=True,
        )
        try:
            return retrying(once)
        except openai.OpenAIError as error:
            return error

    def _wait(self, state: tenacity.RetryCallState) -> float:
        """Seconds to wait: what the server asks for, or longer by chance."""
        error = state.outcome.exception() if state.outcome else None
        return max(_retry_after(error), self._backoff(state))

    def _brief(self, error: openai.OpenAIError) -> str:
        """The error in one short line, without the key even if the server repeats it."""
        text = str(error)
        body = getattr(error, "body", None)
        if isinstance(body, str) and body not in text:
            text = f"{text}: {body}"
        text = redact(f"{type(error).__name__}: {text}", self._variable)
        return " ".join(text.split())[:300]

    def _error(self, error: openai.OpenAIError, call: _Call) -> LLMError:
        status = getattr(error, "status_code", None)
        kind: type[LLMError] = LLMTransportError
        remedy = "try again later: the run can be resumed"
        if status in (401, 403) or (status == 400 and _KEY.search(str(getattr(error, "body", "")))):
            kind = LLMAuthError
            remedy = f"check the key in the environment variable `{self._variable}`"
        elif _out_of_quota(error):
            kind = LLMQuotaError
            remedy = "the account is out of quota: top it up, then resume the run"
        elif _permanent(error):
            kind = LLMError
            remedy = "check `llm.model` and `llm.base_url`"
            if _CONTEXT.search(str(getattr(error, "body", ""))):
                remedy = "serve the model with a longer context, or lower `llm.max_tokens`"
        requests = f"{len(call.attempts)} request" + "s" * (len(call.attempts) != 1)
        return kind(f"{self.model} at {self._host} failed after {requests}: {self._brief(error)}; {remedy}.")


class _Call:
    """When one logical call began, and its requests so far."""

    def __init__(self, started: float, attempts: list[Attempt]) -> None:
        self.started = started
        self.attempts = attempts

    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def busy(self) -> float:
        """Seconds of the requests so far and of the waits between them."""
        return sum(attempt.seconds + attempt.waited for attempt in self.attempts)


def unbounded(schema: Mapping[str, Any], keep: frozenset[str] = frozenset()) -> dict[str, Any]:
    """`schema` without numeric and length bounds but those in `keep`; several gateways refuse them."""

    def clean(node: Any) -> Any:
        if isinstance(node, Mapping):
            # Below `properties` the keys are names of the caller's, not keywords.
            return {
                key: {name: clean(part) for name, part in value.items()}
                if key == "properties"
                else clean(value)
                for key, value in node.items()
                if key not in _BOUNDS or key in keep
            }
        return [clean(part) for part in node] if isinstance(node, list) else node

    cleaned: dict[str, Any] = clean(schema)
    return cleaned


def _out_of_quota(error: BaseException | None) -> bool:
    if isinstance(error, openai.APIStatusError) and error.status_code == 402:  # OpenRouter's way to say it
        return True
    return isinstance(error, openai.RateLimitError) and "insufficient_quota" in str(error.body)


def _permanent(error: openai.OpenAIError) -> bool:
    """Whether the same request will not be served later either."""
    if not isinstance(error, openai.APIStatusError):
        return False
    return _validation(error) or (error.status_code < 500 and error.status_code not in (408, 409, 429))


def _validation(error: BaseException) -> bool:
    return isinstance(error, openai.InternalServerError) and bool(_VALIDATION.search(str(error.body)))


def _refused(error: openai.APIStatusError) -> bool:
    return error.status_code in (400, 422) or _validation(error)


def _retriable(error: BaseException) -> bool:
    if isinstance(error, openai.RateLimitError):
        return not _out_of_quota(error)
    if isinstance(error, openai.InternalServerError):
        return not _validation(error)
    return isinstance(error, openai.APIConnectionError)  # APITimeoutError is one


def _retry_after(error: BaseException | None) -> float:
    """Seconds that the server asks to wait: a number or an HTTP date; 0 if it does not say."""
    if not isinstance(error, openai.APIStatusError):
        return 0.0
    headers = error.response.headers
    try:
        if "retry-after-ms" in headers:
            seconds = float(headers["retry-after-ms"]) / 1000
        else:
            seconds = float(headers.get("retry-after", 0))
    except ValueError:
        date = email.utils.parsedate_tz(headers.get("retry-after", ""))
        seconds = 0.0 if date is None else email.utils.mktime_tz(date) - time.time()
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0
