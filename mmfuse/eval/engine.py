"""What a model does in an evaluation: answer in its own words, or say how likely given answers are.

`Engine` is all that the runner knows of a model. `NetworkEngine` is that of a `MultimodalLM`; anything else that can
answer (another framework's model, a server) takes part by offering the same methods.

Shapes: `B` rows, `S` tokens, `T` tokens of the longest answer, `V` vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

import mmfuse
from mmfuse.analysis.mode import evaluation_mode
from mmfuse.eval.tasks.items import Item, Request, digest_of
from mmfuse.models import EncodedSample, MultimodalLM, MultimodalProcessor
from mmfuse.models.chat import content_text
from mmfuse.sequence import TokenMap


@dataclass(frozen=True)
class Answer:
    """An answer in the model's own words.

    Attributes:
        text: without special tokens and outer whitespace.
        finished: the model ended it itself; False if it was cut.
        tokens: how many were generated, the ending one included.
        logprob: the sum of their log-probabilities under greedy decoding.
        margin: the smallest gap in log-probability between a token and the second best; where it is within rounding,
            another batch may give another answer.
    """

    text: str
    finished: bool
    tokens: int
    logprob: float
    margin: float


@dataclass(frozen=True)
class Likelihoods:
    """How likely the options of an item are.

    Attributes:
        logprobs: of each option and the token that ends it, given the prompt.
        tokens: of each option, the ending one included.
    """

    logprobs: tuple[float, ...]
    tokens: tuple[int, ...]


class Engine(Protocol):
    """What the runner asks of a model."""

    def identity(self) -> dict[str, str]:
        """All that answers depend on beside the question, by name: digests of weights, config and so on."""
        ...

    def prompt(self, item: Item) -> str:
        """The prompt as the model reads it."""
        ...

    def lengths(self, item: Item, request: Request) -> list[int]:
        """The tokens of each row that the item takes: one to generate, one for each option to rank."""
        ...

    def generate(self, items: Sequence[Item], media: Sequence[Sequence[Any]], max_new_tokens: int) -> list[Answer]:
        """Greedy answers to items with their decoded media.

        Raises:
            DataError, ValueError, TypeError: a medium that the model cannot take.
            torch.OutOfMemoryError: the batch is too large.
        """
        ...

    def likelihoods(self, items: Sequence[Item], media: Sequence[Sequence[Any]]) -> list[Likelihoods]:
        """The log-likelihood of each option of items with their decoded media; raises as `generate`."""
        ...


class NetworkEngine:
    """A `MultimodalLM` with its processor.

    Args:
        model: on the device where it is to run; evaluated in evaluation mode, each module gets its own mode back.
        processor: of that model.
    """

    def __init__(self, model: MultimodalLM, processor: MultimodalProcessor) -> None:
        self.model, self.processor = model, processor
        self._ends = closing_tokens(model, processor)
        self._identity: dict[str, str] | None = None

    def identity(self) -> dict[str, str]:
        if self._identity is None:
            config = self.model.config.to_dict()
            config.pop("transformers_version", None)
            config.pop("_name_or_path", None)
            fusion = config["fusion"]
            self._identity = {
                "weights": weights_digest(self.model),
                "config": digest_of(config),
                "fusion": fusion if isinstance(fusion, str) else str(fusion["type"]),
                "processor": processor_digest(self.processor),
                "dtype": str(self.model.dtype).removeprefix("torch."),
                "device": self.model.device.type,
                "mmfuse": mmfuse.__version__,
            }
        return dict(self._identity)

    def prompt(self, item: Item) -> str:
        style = self.processor.encoder.format
        turns = [style.header(m["role"]) + content_text(m["content"], item.id) + style.end for m in item.messages]
        return style.begin + "".join(turns) + style.assistant

    def lengths(self, item: Item, request: Request) -> list[int]:
        if request is Request.GENERATE:
            return [len(self._encode(item, item.media))]
        return [len(self._encode(item, item.media, option)) for option in item.options]

    def generate(self, items: Sequence[Item], media: Sequence[Sequence[Any]], max_new_tokens: int) -> list[Answer]:
        batch = self._collate([self._encode(item, own) for item, own in zip(items, media, strict=True)])
        config = greedy_config(self._ends, self.processor, max_new_tokens)
        gaps = _Gaps()
        length = batch["input_ids"].shape[1]
        with evaluation_mode(self.model), torch.inference_mode():
            made = self.model.generate(**batch, generation_config=config, logits_processor=LogitsProcessorList([gaps]))
        return self._answers(made[:, length:].cpu(), *gaps.table())

    def _answers(self, made: Tensor, best: Tensor, margin: Tensor) -> list[Answer]:
        """From tokens `[B, T]`, their log-probabilities and margins to answers; what follows the end does not count."""
        texts = self.processor.tokenizer.batch_decode(made, skip_special_tokens=True)
        ends = torch.isin(made, torch.tensor(self._ends, dtype=made.dtype))
        answers = []
        for row, text in enumerate(texts):
            finished = bool(ends[row].any())
            count = int(ends[row].int().argmax()) + 1 if finished else made.shape[1]
            logprob, gap = float(best[row, :count].sum()), float(margin[row, :count].min())
            answers.append(Answer(text.strip(), finished, count, logprob, gap))
        return answers

    def likelihoods(self, items: Sequence[Item], media: Sequence[Sequence[Any]]) -> list[Likelihoods]:
        rows = [
            self._encode(item, own, option) for item, own in zip(items, media, strict=True) for option in item.options
        ]
        batch = self._collate(rows)
        tokens: TokenMap = batch["tokens"]
        last = tokens.is_answer & (tokens.turn == tokens.turn.amax(1, keepdim=True))
        longest = int(last.sum(1).max())
        with evaluation_mode(self.model), torch.inference_mode():
            logits = self.model(**batch, logits_to_keep=longest + 1).logits
        logprobs = answer_logprobs(logits, batch["input_ids"], last).sum(1).tolist()
        counts = last.sum(1).tolist()
        found, start = [], 0
        for item in items:
            own_rows = slice(start, start := start + len(item.options))
            found.append(Likelihoods(tuple(logprobs[own_rows]), tuple(counts[own_rows])))
        return found

    def inputs(self, item: Item, media: Sequence[Any], answer: str | None = None) -> dict[str, Any]:
        """What the model takes for one item, with an answer or, without one, up to where it would begin."""
        return self._collate([self._encode(item, media, answer)])

    def _encode(self, item: Item, media: Sequence[Any], option: str | None = None) -> EncodedSample:
        """The prompt, or the prompt with an option as its answer."""
        by_modality: dict[str, list[Any]] = {}
        for file, medium in zip(item.media, media, strict=True):
            by_modality.setdefault(file.modality, []).append(medium)
        encode = self.processor.encoder.encode_messages
        if option is None:
            return encode(item.messages, by_modality, generation=True, key=item.id)
        return encode([*item.messages, {"role": "assistant", "content": option}], by_modality, key=item.id)

    def _collate(self, samples: Sequence[EncodedSample]) -> dict[str, Any]:
        batch = self.processor.collate(samples, side="left", supervised=False)
        return {name: value.to(self.model.device) for name, value in batch.items()}


class _Gaps(LogitsProcessor):
    """Changes nothing; keeps the best token's log-probability and its lead over the second at every step."""

    def __init__(self) -> None:
        self._best: list[Tensor] = []
        self._margin: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        top = scores.float().log_softmax(dim=-1).topk(2, dim=-1).values
        self._best.append(top[:, 0])
        self._margin.append(top[:, 0] - top[:, 1])
        return scores

    def table(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities and margins, float32 `[B, T]`."""
        return torch.stack(self._best, dim=1).cpu(), torch.stack(self._margin, dim=1).cpu()


def answer_logprobs(logits: Tensor, input_ids: Tensor, answer: Tensor) -> Tensor:
    """The log-probability of each answer token, 0 elsewhere: float32 `[B, T]`.

    Args:
        logits: `[B, T + 1, V]` of the last tokens of rows that end with their answers.
        input_ids: `[B, S]`.
        answer: bool `[B, S]`, the answer tokens.
    """
    longest = logits.shape[1] - 1
    targets, counted = input_ids[:, -longest:], answer[:, -longest:]
    logprobs = logits[:, :-1].float().log_softmax(dim=-1).gather(2, targets.unsqueeze(2)).squeeze(2)
    return logprobs.masked_fill(~counted, 0.0)


def closing_tokens(model: MultimodalLM, processor: MultimodalProcessor) -> list[int]:
    """The tokens that end an answer: those of the generation config and the chat format's own."""
    known = model.generation_config.eos_token_id
    ends = {known} if isinstance(known, int) else set(known or ())
    closing = processor.tokenizer.encode(processor.encoder.format.end, add_special_tokens=False)
    if len(closing) == 1 or (closing and closing[0] in processor.tokenizer.all_special_ids):
        ends.add(closing[0])
    return sorted(ends)


def greedy_config(ends: Sequence[int], processor: MultimodalProcessor, max_new_tokens: int) -> GenerationConfig:
    """Greedy decoding that stops at `ends`.

    What is not said here comes from the checkpoint's own generation config, so penalties, which some checkpoints bring,
    are switched off by name.
    """
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        min_length=0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=True,
        eos_token_id=list(ends) or None,
        pad_token_id=processor.tokenizer.pad_token_id,
    )


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of all parameters and buffers that are saved."""
    whole = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        whole.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        whole.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return whole.hexdigest()


def processor_digest(processor: MultimodalProcessor) -> str:
    """SHA-256 over tokenizer, chat format, tokens of media and what is done to pixels."""
    pixels = {name: value for name, value in processor.image_processor.to_dict().items() if not name.startswith("_")}
    pixels.pop("image_processor_type", None)
    tokenizer: Any = processor.tokenizer
    core = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    parts = [core, processor.chat_format, processor.media_tokens, processor.feature_shapes]
    return hashlib.sha256((digest_of(parts) + repr(sorted(pixels.items()))).encode()).hexdigest()
