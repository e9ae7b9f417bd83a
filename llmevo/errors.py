"""The exceptions that llmevo raises.

::

    LlmevoError
    ├── SpaceError        a gene, a space or a point of it is wrong (also a ValueError)
    ├── TrialError        ask or tell was used against its rules (also a ValueError)
    ├── StatsError        scores cannot be compared as asked (also a ValueError)
    ├── GenomeError       the YAML file, or what it names, is wrong
    ├── StageError        a stage of the pipeline failed; a trial's failure, not the run's
    ├── ProposerError     a proposer cannot go on
    │   └── LLMError      a language model did not serve, for a reason that has no class of its own
    │       ├── LLMTransportError  it was not reached, not in time, or only with server errors
    │       ├── LLMAuthError       the key is missing or refused
    │       ├── LLMQuotaError      the account is out of quota
    │       ├── LLMBudgetError     our own limit of calls, tokens or dollars is reached
    │       └── LLMContentError    five answers in a row could not be used
    └── StoreError        the run directory cannot be used
        └── RunLockedError   another process drives this run

A trial's failure is data (`Trial.error`), not an exception: `StageError` carries it from a stage to
the pipeline and never leaves the worker.
"""

from __future__ import annotations


class LlmevoError(Exception):
    """Base of every exception that llmevo raises on purpose."""


class SpaceError(LlmevoError, ValueError):
    """A gene, a space or a point of it breaks a rule."""


class TrialError(LlmevoError, ValueError):
    """`ask` or `tell` was used against its rules."""


class StatsError(LlmevoError, ValueError):
    """Scores that cannot be compared as asked: other items, or an argument out of range."""


class GenomeError(LlmevoError):
    """The genome file, or something that it names, is wrong."""


class StageError(LlmevoError):
    """A stage failed for one trial.

    Args:
        stage: `merge`, `train` or `evaluate`.
        reason: One line for a person.
    """

    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(f"{stage}: {reason}")
        self.stage = stage
        self.reason = reason


class ProposerError(LlmevoError):
    """A proposer cannot go on; the run stops and can be resumed."""


class LLMError(ProposerError):
    """A language model does not serve: the request was refused, or for a reason with a class below."""


class LLMTransportError(LLMError):
    """The endpoint was not reached, not in time, or gave only server errors or rate limits."""


class LLMAuthError(LLMError):
    """The key is missing or refused."""


class LLMQuotaError(LLMError):
    """The account behind the key is out of quota."""


class LLMBudgetError(LLMError):
    """A limit of the run (`llm.max_calls`, `llm.max_total_tokens` or `llm.max_usd`) leaves no room."""


class LLMContentError(LLMError):
    """The language model answers, but five answers in a row could not be used."""


class StoreError(LlmevoError):
    """The run directory or its store cannot be used."""


class RunLockedError(StoreError):
    """Another process drives this run."""
