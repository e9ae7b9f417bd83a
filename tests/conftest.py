"""Fixtures for the whole suite: tiny random Llamas for the plumbing, SmolLM2 where a real model is needed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

# Before any import of transformers or datasets: no test may reach for the network, or find
# something in the user's cache of answers or leave it there.
os.environ.update(
    HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", LLMEVO_CACHE="off"
)
# Leave the cores to others: one thread for torch where pytest-xdist runs tests side by side, otherwise two.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")

_ROOT = Path(__file__).resolve().parent.parent

_CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CORPUS = [
    "The capital of France is Paris, and the capital of Finland is Helsinki.",
    "Die Hauptstadt von Deutschland ist Berlin; in Frankreich ist es Paris.",
    "Question: What is the chemical symbol of iron?\nAnswer: Fe",
    "The currency of Japan is the yen. The currency of Sweden is the krona.",
    "1 + 1 = 2, 2 + 2 = 4, 12 * 12 = 144.",
]


@dataclass(frozen=True)
class TinyLlamas:
    """A base and three parents that differ from it by random steps; all share one tokenizer.

    Args:
        base: Folder of the base model.
        parents: Folders of the parents.
    """

    base: Path
    parents: tuple[Path, Path, Path]


def _save_tokenizer(folder: Path) -> int:
    """Train a byte-level BPE of 512 tokens with a ChatML template, save it, and return its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(
            vocab_size=512,
            special_tokens=special,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[1],
        eos_token=special[2],
        pad_token=special[2],
        unk_token=special[0],
        model_max_length=256,
        chat_template=_CHAT_TEMPLATE,
    )
    fast.save_pretrained(folder)
    return len(fast)


def save_tiny_llama(
    folder: Path,
    *,
    seed: int,
    start: Path | None = None,
    tied: bool = True,
    layers: int = 4,
    hidden: int = 64,
    noise: float = 0.02,
    dtype: str = "bfloat16",
) -> Path:
    """Save a random Llama (hidden 64, 4 heads, 2 of them for keys) with a tokenizer that has a chat template.

    Args:
        folder: Where to.
        seed: Of the weights; the global random state is left alone.
        start: Start from this model and add noise instead of drawing new weights.
        tied: Whether the head is the embedding matrix.
        layers: Decoder layers.
        hidden: Width; a multiple of 16.
        noise: Standard deviation of what is added to `start`.
        dtype: Of the saved weights.

    Returns:
        `folder`.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    size = _save_tokenizer(folder)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        if start is None:
            config = LlamaConfig(
                vocab_size=size,
                hidden_size=hidden,
                intermediate_size=2 * hidden,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=256,
                tie_word_embeddings=tied,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=2,
            )
            model = LlamaForCausalLM(config)
        else:
            model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=noise)
        model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests counted (`record_property("counted", ...)`), whichever process they ran in."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "counted":
                terminalreporter.write_line(f"{report.nodeid.rsplit('::', 1)[-1]}: {value}")


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    """Weights that a test draws are the same whichever tests ran before it in its process."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def make_tiny_llama() -> Callable[..., Path]:
    """`save_tiny_llama`, for tests that need a model of their own."""
    return save_tiny_llama


@pytest.fixture(scope="session")
def tiny_llamas(tmp_path_factory: pytest.TempPathFactory) -> TinyLlamas:
    """A tied base and three parents (4 layers, hidden 64, about 0.2 M parameters, bfloat16); read only."""
    root = tmp_path_factory.mktemp("tiny-llamas")
    base = save_tiny_llama(root / "base", seed=0)
    a, b, c = (save_tiny_llama(root / f"parent-{n}", seed=n, start=base) for n in (1, 2, 3))
    return TinyLlamas(base, (a, b, c))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as safetensors (bfloat16), dequantised once into `.cache/smollm2`."""
    from llmevo import embedded

    return embedded.smollm2(_ROOT / ".cache" / "smollm2")
