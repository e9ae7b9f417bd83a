"""Short names for models, and how many layers they have."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmevo import hub
from llmevo.errors import GenomeError
from llmevo.genome import Genome

# What config.json calls the number of layers: most models; GPT-2, BLOOM; MPT; T5; BART.
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")


def labels(models: Sequence[str]) -> dict[str, str]:
    """A short unique name for each model: the end of its path, or of its adapter's path.

    Where two end alike, more of the path is taken, then the whole reference. A dot separates the parts of a
    gene's name, but may also stand in a label: names are never taken apart.
    """
    paths = {}
    for model in dict.fromkeys(models):
        reference = model.rpartition("+")[2].partition("@")[0]
        paths[model] = [
            part for part in reference.replace("\\", "/").split("/") if part not in ("", ".", "..")
        ]
    result: dict[str, str] = {}
    for model, parts in paths.items():
        for count in range(1, len(parts) + 1):
            label = "/".join(parts[-count:])
            if sum("/".join(other[-count:]) == label for other in paths.values()) == 1:
                result[model] = label
                break
        else:
            result[model] = model
    return result


def resolve_label(name: str, known: dict[str, str], where: str) -> str:
    """The model whose path or label is `name`.

    Raises:
        GenomeError: No model is called that.
    """
    for model, label in known.items():
        if name in (model, label):
            return model
    near = difflib.get_close_matches(name, known.values(), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise GenomeError(f"`{where}` must name one of {', '.join(known.values())}, but got {name!r}.{hint}")


def num_layers(genome: Genome, offline: bool = False) -> int:
    """Transformer layers of the genome's models.

    It is `genome.num_layers` if that is given, else what config.json of the first model says; no weights
    are read. A model on the hub has its config.json downloaded, unless `offline`.

    Args:
        genome: The genome.
        offline: Only files on this machine.

    Raises:
        GenomeError: config.json is not to be had or says no number of layers, or `layer_granularity` does not
            divide that number.
    """
    spec = genome.genome
    model = spec.models[0]
    layers = spec.num_layers or _layers(_config(model.partition("+")[0], offline), model)
    if spec.layer_granularity and layers % spec.layer_granularity:
        raise GenomeError(
            f"`genome.layer_granularity` must divide the number of layers, {layers}, but got "
            f"{spec.layer_granularity}; choose one of {[n for n in range(1, layers + 1) if layers % n == 0]}."
        )
    return layers


def _config(reference: str, offline: bool) -> Any:
    """The content of config.json of `path[@revision]`."""
    name, _, revision = reference.partition("@")
    path = Path(name) / "config.json"
    if not Path(name).is_dir():
        from huggingface_hub import hf_hub_download

        try:
            path = Path(
                hf_hub_download(name, "config.json", revision=revision or None, local_files_only=offline)
            )
        except Exception as error:  # the hub's client raises many kinds; each means that there is no file
            raise hub.missing(name, error, ", or give `genome.num_layers`") from None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GenomeError(
            f"{path} must be a JSON file, but it cannot be read ({error}); check `genome.models`."
        ) from None


def _layers(config: Any, model: str) -> int:
    for part in (config, config.get("text_config") if isinstance(config, dict) else None):
        for key in _LAYERS:
            layers = part.get(key) if isinstance(part, dict) else None
            if isinstance(layers, int) and layers > 0:
                return layers
    raise GenomeError(
        f"config.json of {model!r} must say `{_LAYERS[0]}`, but does not; give `genome.num_layers`."
    )
