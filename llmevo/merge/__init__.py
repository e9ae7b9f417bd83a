"""The merge stage: parents in, one resident merged model out.

mergekit does the arithmetic and says what each tensor's parameters are; here are the checks before anything
is spent, the weights that stay in memory, and the export. Importing this package imports no torch.
"""

from llmevo.merge.export import export as export
from llmevo.merge.merger import Merger as Merger
from llmevo.merge.parents import check_parents as check_parents
