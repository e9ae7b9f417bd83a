"""llmevo evolves language models: it searches merge recipes and LoRA hyperparameters.

The core is `Space`, `Optimizer` and the proposers; importing it needs numpy and nothing heavier.
"""

from llmevo import quiet
from llmevo.errors import GenomeError as GenomeError
from llmevo.errors import LLMError as LLMError
from llmevo.errors import LlmevoError as LlmevoError
from llmevo.errors import ProposerError as ProposerError
from llmevo.errors import RunLockedError as RunLockedError
from llmevo.errors import SpaceError as SpaceError
from llmevo.errors import StageError as StageError
from llmevo.errors import StoreError as StoreError
from llmevo.errors import TrialError as TrialError
from llmevo.optimizer import Optimizer as Optimizer
from llmevo.proposers import Proposer as Proposer
from llmevo.space import Categorical as Categorical
from llmevo.space import Condition as Condition
from llmevo.space import Float as Float
from llmevo.space import Int as Int
from llmevo.space import Space as Space
from llmevo.trial import Proposal as Proposal
from llmevo.trial import Score as Score
from llmevo.trial import State as State
from llmevo.trial import Trial as Trial

__version__ = "0.1.0"

quiet.bitsandbytes()
