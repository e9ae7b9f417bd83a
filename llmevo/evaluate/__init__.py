"""The evaluate stage: lm-eval tasks, built once, scored item by item.

Importing this package imports neither torch nor lm-eval; they load when something here is used.
"""

from llmevo.evaluate.cache import AnswerCache, open_cache
from llmevo.evaluate.hardware import device, dtype
from llmevo.evaluate.scorer import Evaluator
from llmevo.evaluate.tasks import check_tasks

__all__ = ["AnswerCache", "Evaluator", "check_tasks", "device", "dtype", "open_cache"]
