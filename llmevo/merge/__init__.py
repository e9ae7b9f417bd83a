"""The merge stage: parents in, one resident merged model out.

mergekit does the arithmetic and says what each tensor's parameters are; here are the checks before anything
is spent, the weights that stay in memory, and the export. Importing this package imports no torch.

The exact mode is mergekit's own arithmetic, bit for bit. What the fast mode does, in float32 with one
rounding at the end, and how far its weights are from mergekit's (a unit is one in the last of bfloat16's
8 bits):

==================================  ===============================  =====================================
method                              fast form                        bound
==================================  ===============================  =====================================
linear, slerp                       sum of the models                1 unit of the result
task_arithmetic                     base and sum of differences      mergekit's roundings of the products,
                                                                     the sum and the result
nuslerp, multislerp, karcher,       sum of the models, or base and   mergekit's roundings: it computes in
model_stock (not row by row)        sum of differences               the models' dtype
ties, breadcrumbs, ..._ties         window of magnitudes             as task_arithmetic; elements equal to
                                                                     a threshold are all kept
dare_*, della_*                     masks from a counter's hash      the same distribution, other masks
all others                          mergekit's own                   0
==================================  ===============================  =====================================

A LoRA that is held as factors is added to its base in float32; mergekit rounds it to the models' dtype first,
which is half a unit of each adapted matrix, times its weight, beside the bounds above. The models that count,
their weights and masks follow from the recipe as mergekit's planner resolves it.
"""

from llmevo.merge.export import export as export
from llmevo.merge.loaded import Loaded as Loaded
from llmevo.merge.loaded import copy_of as copy_of
from llmevo.merge.loaded import needed as needed
from llmevo.merge.loaded import skeleton as skeleton
from llmevo.merge.merger import Merger as Merger
from llmevo.merge.parents import check_parents as check_parents
