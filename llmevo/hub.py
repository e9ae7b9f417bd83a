"""What is said where a name leads to no model: neither a folder nor one that the Hugging Face hub gives."""

from __future__ import annotations

from llmevo.errors import GenomeError


def missing(path: str, error: Exception, remedy: str = "") -> GenomeError:
    """The error for a model that is not here.

    Args:
        path: What was given, without revision and adapter.
        error: What the hub's client raised; it has a dozen kinds, from OSError to httpx's.
        remedy: What else may be done, such as `, or give a number`.
    """
    from huggingface_hub import errors

    what = "`genome.models` must name folders or models on the Hugging Face hub, but"
    if isinstance(error, errors.HFValidationError):
        return GenomeError(f"{what} there is no folder {path!r}; check the path.")
    if isinstance(error, errors.GatedRepoError):
        why = "the hub gives it only to those who accepted its terms; accept them and run `hf auth login`"
        return GenomeError(f"{what} {path!r} is no folder, and {why}.")
    if isinstance(error, errors.RepositoryNotFoundError):
        return GenomeError(
            f"{what} {path!r} is neither, or it is private; check the name, or run `hf auth login`."
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        why = "the hub cannot be reached or may not be asked"
    else:
        said = str(error).strip()
        why = said.splitlines()[0].rstrip(".")[:200] if said else type(error).__name__
    return GenomeError(
        f"{what} {path!r} is no folder, is not in the hub's cache on this machine and could not be "
        f"downloaded ({why}); check the name, download it once with `hf download {path}`{remedy}."
    )
