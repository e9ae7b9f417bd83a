"""The train stage: parameter-efficient training of the resident model, with peft's adapters.

Importing this package imports neither torch nor peft; they load when something here is used.
"""

from llmevo.train.check import prepare
from llmevo.train.inherit import Start
from llmevo.train.nf4 import check as check_packages
from llmevo.train.trainer import Trained, Trainer

__all__ = ["Start", "Trained", "Trainer", "check_packages", "prepare"]
