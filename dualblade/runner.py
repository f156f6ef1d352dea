# SPDX-License-Identifier: Apache-2.0
"""The generation loop: prefill the prompt in chunks, layer by layer, then one token a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import Cache

from dualblade.errors import ModelError, UsageError
from dualblade.models import decoder_layers, last_position_only
from dualblade.prefill import by_layers, leading_layers


@dataclass(frozen=True, slots=True)
class Sampling:
    """temperature 0 is greedy; the rest counts above it. top_p in (0, 1], top_k 0 for all."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise UsageError("sampling wants temperature >= 0, 0 < top-p <= 1 and top-k >= 0")


@dataclass(frozen=True, slots=True)
class Prompt:
    """ids, mask: [batch, tokens], int64; padding is on the left, where the mask is 0."""

    ids: torch.Tensor
    mask: torch.Tensor

    @property
    def padded(self) -> bool:
        return not bool(self.mask.all())


@dataclass(slots=True)
class Generated:
    """tokens: one list a sequence. Times in seconds."""

    tokens: list[list[int]] = field(default_factory=list)
    prefill_s: float = 0.0
    decode_s: float = 0.0
    steps: int = 0

    @property
    def s_per_token(self) -> float:
        """Seconds of a decoding step. The first token came with the prompt."""
        return self.decode_s / max(1, self.steps - 1)


class Generation:
    """One prompt on one model with one cache.

    chunk: prompt tokens of a forward pass. span: tokens that pass a layer before the next one is begun, a
    multiple of chunk. on_prefill(done, total), on_decode() before the second token and on_token(ids) are
    called as the work goes on.
    """

    def __init__(
        self,
        model: Any,
        cache: Cache,
        prompt: Prompt,
        sampling: Sampling,
        eos: frozenset[int],
        chunk: int,
        span: int,
        on_prefill: Callable[[int, int], None] = lambda done, total: None,
        on_token: Callable[[list[int]], None] = lambda ids: None,
        on_decode: Callable[[], None] = lambda: None,
    ):
        self.model = model
        self.cache = cache
        self.prompt = prompt
        self.sampling = sampling
        self.eos = eos
        self.chunk = chunk
        self.span = span
        self.on_prefill = on_prefill
        self.on_token = on_token
        self.on_decode = on_decode
        self._last_only = last_position_only(model)
        self._device = next(model.parameters()).device
        self._random = torch.Generator().manual_seed(sampling.seed)
        self._mask = prompt.mask

    @torch.inference_mode()
    def run(self, max_new_tokens: int) -> Generated:
        """Stops at `max_new_tokens`, or when every sequence has met an end token."""
        result = Generated(tokens=[[] for _ in range(len(self.prompt.ids))])
        begun = time.perf_counter()
        logits = self.prefill()
        result.prefill_s = time.perf_counter() - begun
        self.on_decode()
        begun = time.perf_counter()
        for tokens in self._decode(logits, max_new_tokens):
            result.steps += 1
            self._take(result, tokens)
        result.decode_s = time.perf_counter() - begun
        return result

    def prefill(self) -> torch.Tensor:
        """The whole prompt. Logits of its last position, [batch, vocabulary]."""
        total = self.prompt.ids.shape[1]
        logits = torch.empty(0)
        for begin in range(0, total, self.span):
            end = min(begin + self.span, total)
            logits = self._prefill_span(begin, end)
            self.on_prefill(end, total)
        return logits

    def _prefill_span(self, begin: int, end: int) -> torch.Tensor:
        chunks = [(at, min(at + self.chunk, end)) for at in range(begin, end, self.chunk)]
        passes = [partial(self._forward, self.prompt.ids[:, at:stop], at) for at, stop in chunks]
        if len(passes) == 1:
            return passes[0]()
        layers = decoder_layers(self.model)
        steps, done = len(passes) * len(layers), 0

        def on_step() -> None:
            nonlocal done
            done += 1
            self.on_prefill(begin + (end - begin) * done // steps, self.prompt.ids.shape[1])

        return by_layers(layers, passes, leading_layers(self.cache), on_step)

    def _decode(self, logits: torch.Tensor, limit: int) -> Iterator[torch.Tensor]:
        ended = torch.zeros(len(self.prompt.ids), dtype=torch.bool)
        ends = torch.tensor(sorted(self.eos), dtype=torch.long)
        for step in range(limit):
            tokens = self._sample(logits)
            yield torch.where(ended, -1, tokens)
            ended |= torch.isin(tokens, ends)
            if bool(ended.all()) or step + 1 == limit:
                return
            self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=1)
            logits = self._forward(tokens[:, None], self._mask.shape[1] - 1)

    def _forward(self, ids: torch.Tensor, begin: int) -> torch.Tensor:
        """Logits of the last of these positions, [batch, vocabulary]; `begin` tokens are in the cache."""
        mask = self._mask[:, : begin + ids.shape[1]]
        # A mask that hides nothing would only cost attention its fast path.
        extra = {"attention_mask": mask} if self.prompt.padded else {}
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, begin:].clone()  # a view keeps all of them
        extra = {name: self._there(tensor) for name, tensor in extra.items()}
        out = self.model(
            input_ids=self._there(ids),
            position_ids=self._there(positions),
            past_key_values=self.cache,
            use_cache=True,
            **self._last_only,
            **extra,
        )
        return out.logits[:, -1].float().cpu()

    def _there(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device, non_blocking=True)

    def _sample(self, logits: torch.Tensor) -> torch.Tensor:
        if self.sampling.temperature == 0:
            return logits.argmax(-1)
        scores = logits / self.sampling.temperature
        if self.sampling.top_k:
            least = scores.topk(min(self.sampling.top_k, scores.shape[-1])).values[:, -1:]
            scores = scores.masked_fill(scores < least, float("-inf"))
        probabilities = _nucleus(scores.softmax(-1), self.sampling.top_p)
        return torch.multinomial(probabilities, 1, generator=self._random)[:, 0]

    def _take(self, result: Generated, tokens: torch.Tensor) -> None:
        ids = tokens.tolist()
        for row, token in zip(result.tokens, ids, strict=True):
            if token >= 0:
                row.append(token)
        self.on_token(ids)


def _nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keep the fewest tokens whose probabilities reach top_p (Holtzman et al., 2020)."""
    if top_p >= 1:
        return probabilities
    ordered, order = probabilities.sort(descending=True)
    ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
    return torch.zeros_like(probabilities).scatter(-1, order, ordered)


class TextStream:
    """Token ids to text as they come, holding back what may still change (half a character)."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]):
        self._tokenizer = tokenizer
        self._write = write
        self._ids: list[int] = []
        self._shown = 0

    def push(self, token: int) -> None:
        self._ids.append(token)
        self._show(self._text().removesuffix("\ufffd"))

    def end(self) -> str:
        """The whole text."""
        text = self._text()
        self._show(text)
        return text

    def _text(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True))

    def _show(self, text: str) -> None:
        self._write(text[self._shown :])
        self._shown = max(self._shown, len(text))


# prompts ------------------------------------------------------------------------------------


def encode(tokenizer: Any, texts: list[str], chat: bool = False) -> Prompt:
    """Texts padded on the left to one length. chat: each is what a user says, in the words of the
    tokenizer's template. Raises UsageError for an empty prompt, ModelError where there is no template."""
    written = [_as_chat(tokenizer, text) for text in texts] if chat else texts
    batch = tokenizer(written, return_tensors="pt", padding=True, add_special_tokens=not chat)
    if not batch["input_ids"].shape[1]:
        raise UsageError("the prompt is empty", "pass some text with --prompt")
    return Prompt(batch["input_ids"], batch["attention_mask"])


def _as_chat(tokenizer: Any, text: str) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            "this model's tokenizer has no chat template",
            "leave --chat out to pass the prompt as it is, or take an instruct model",
        )
    said = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False))


def random_prompt(batch: int, tokens: int, vocabulary: int, seed: int) -> Prompt:
    """Random token ids, the same for the same seed."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (batch, tokens), generator=random)
    return Prompt(ids, torch.ones_like(ids))


def end_tokens(model: Any) -> frozenset[int]:
    """The token ids that end a sequence."""
    ends = model.generation_config.eos_token_id
    return frozenset(() if ends is None else ends if isinstance(ends, list) else (ends,))
