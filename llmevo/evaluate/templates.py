"""lm-eval's Jinja templates, compiled once.

lm-eval compiles a task's template whenever it renders one: for each item, when a prompt is made and again
when an answer is scored. Compiling takes 0.7 ms and rendering 0.05, so that a tenth of an evaluation went
into templates that it had compiled before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

_MOST = 256  # templates; a task has three or four


@contextlib.contextmanager
def compiled_once() -> Iterator[None]:
    """Within the block, lm-eval finds a template that it has compiled before; afterwards it is as it was.

    A template follows from its text and lm-eval's one environment alone, so what is rendered is the same.
    """
    from lm_eval.utils import env

    if "from_string" in vars(env):  # within such a block
        yield
        return
    env.from_string = _compiled
    try:
        yield
    finally:
        vars(env).pop("from_string", None)


@lru_cache(_MOST)
def _compiled(source: str) -> Any:
    from lm_eval.utils import env

    return type(env).from_string(env, source)
