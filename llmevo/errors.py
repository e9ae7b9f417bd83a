"""The exceptions that llmevo raises.

::

    LlmevoError
    ├── SpaceError        a gene, a space or a point of it is wrong (also a ValueError)
    ├── TrialError        ask or tell was used against its rules (also a ValueError)
    ├── StatsError        scores cannot be compared as asked (also a ValueError)
    ├── GenomeError       the YAML file, or what it names, is wrong
    ├── StageError        a stage of the pipeline failed; a trial's failure, not the run's
    ├── ProposerError     a proposer cannot go on
    │   └── LLMError      a language model's endpoint did not serve
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
    """A language model's endpoint refused, timed out or could not be reached."""


class StoreError(LlmevoError):
    """The run directory or its store cannot be used."""


class RunLockedError(StoreError):
    """Another process drives this run."""
