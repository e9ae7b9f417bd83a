"""What mergekit would do for a recipe: its own planner, asked tensor by tensor.

Which value of a parameter a tensor gets (layer slices, gradients, filters, defaults, the embeddings' and the
head's slice) is mergekit's to say. We take the tasks that `run_merge` would run and run them ourselves, on
weights that are in memory, without graph, files or copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

if TYPE_CHECKING:
    import torch
    from mergekit.common import ModelReference


@final
@dataclass(frozen=True, slots=True)
class Step:
    """The merge of one tensor.

    Args:
        name: Of the output tensor.
        task: mergekit's `ExecuteMergeMethodTask`, with the resolved parameters of this tensor.
        dtype: Of the result, where the recipe or the architecture forces one.
    """

    name: str
    task: Any
    dtype: torch.dtype | None

    def run(self) -> torch.Tensor | None:
        """Gather the inputs and merge them, exactly as mergekit's executor would; None for an absent tensor.

        Raises:
            Exception: Whatever mergekit's method raises for these inputs.
        """
        gather = self.task.gather_tensors
        inputs = gather.execute(**{key: read.execute() for key, read in gather.arguments().items()})
        result: torch.Tensor | None = self.task.execute(inputs)
        return result if result is None or self.dtype is None else result.to(self.dtype)


def architecture(models: Sequence[ModelReference]) -> Any:
    """Return mergekit's description of the models' architecture.

    Args:
        models: References to plain folders. An architecture that mergekit has no table for is inferred from
            their headers.
    """
    from mergekit.architecture import get_architecture_info
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    inputs = [{"model": model} for model in dict.fromkeys(models)]
    return get_architecture_info(
        MergeConfiguration(merge_method="linear", models=inputs), MergeOptions(quiet=True)
    )


def steps(recipe: Any, arch: Any, config: Any) -> list[Step]:
    """Plan a recipe.

    Args:
        recipe: A mergekit configuration as plain data, its models replaced by references that
            `weights.loaders` serves.
        arch: From `architecture`.
        config: The transformers configuration of the output.

    Returns:
        One step for each tensor, in the order in which `run_merge` executes them (by the name of the tensor
        that is read). DARE and DELLA draw their masks from torch's global generator, so that the order
        decides the masks.

    Raises:
        Exception: Whatever mergekit raises for a recipe that it refuses.
    """
    return [traced.step for traced in trace(recipe, arch, config)]


@final
@dataclass(frozen=True, slots=True)
class Traced:
    """A step, and what mergekit resolved its parameters from.

    Args:
        step: The merge of one tensor.
        slice: Index of its output slice.
        position: Of its layer in the slice, from 0 to 1; gradients are read there.
        inputs: The names under which filters see the tensor, one for each model of the step's task.
    """

    step: Step
    slice: int
    position: float
    inputs: tuple[str, ...]


def trace(recipe: Any, arch: Any, config: Any) -> list[Traced]:
    """Plan a recipe as `steps` does, with the same arguments and errors, and keep how."""
    from mergekit.common import dtype_from_name
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import SaveTensor
    from mergekit.options import MergeOptions
    from mergekit.plan import MergePlanner

    places: list[tuple[int, float, tuple[str, ...]]] = []

    class Recorder(MergePlanner):  # type: ignore[misc]
        """mergekit's planner, which notes from where in the recipe it reads."""

        def plan_tensor(
            self, weight: Any, weights_in: Any, models: Any, cfg_reader: Any, **kwargs: Any
        ) -> None:
            before = len(self._tensors)
            super().plan_tensor(weight, weights_in, models, cfg_reader, **kwargs)
            if len(self._tensors) > before:
                slices = [part for module in self.config.modules.values() for part in module.slices]
                index = next(i for i, part in enumerate(slices) if part is cfg_reader.slice_out)
                places.append((index, cfg_reader.t, tuple(w.name for w in weights_in)))

    planner = Recorder(MergeConfiguration.model_validate(recipe), arch, MergeOptions(quiet=True), config)
    # Planning for the disk writes nothing, and `plan_in_memory` fails in 0.1.5 (its task type cannot be
    # made).
    saves = [task for task in planner.plan_to_disk(out_path="") if isinstance(task, SaveTensor)]
    planned = [
        (save, Traced(Step(save.tensor_name, save.tensor_task, dtype_from_name(save.dtype)), *place))
        for save, place in zip(saves, places, strict=True)
    ]
    planned.sort(key=lambda pair: pair[0].group_label() or "")
    return [traced for _, traced in planned]
