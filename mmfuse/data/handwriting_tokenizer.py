"""The small tokenizer of the handwriting demo: byte-level BPE, so that any text round-trips.

Every digit is a token of its own wherever it stands, and so is every word of the demo's questions. The trained files
are shipped in `mmfuse/data/tokenizer/`; `build_tokenizer` makes them again from the question texts:

    python -m mmfuse.data.handwriting_tokenizer FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mmfuse.data.handwriting_questions import FAMILIES, candidates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER_FOLDER: Final = Path(__file__).parent / "tokenizer"
SPECIAL_TOKENS: Final = (
    "<|pad|>",
    "<|bos|>",
    "<|eos|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<image>",
)


def corpus() -> list[str]:
    """Return every question text that a scene of up to 9 x 9 digits can bring, and every answer that is a word."""
    grids = [[[(y + x + start) % 10 for x in range(9)] for y in range(9)] for start in range(10)]
    grids += [[[left, right], [right, left]] for left in range(10) for right in range(10)]
    grids += [[[low, high], [(high + 1) % 10, (high + 2) % 10]] for low in range(10) for high in range(10)]
    texts = {
        line
        for grid in grids
        for family in FAMILIES
        for question, answer in candidates(family, grid)
        for line in (question, answer)
    }
    return sorted(texts)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer on `corpus()`; the same on every call."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[0-9]"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=1,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Each word counts once for its merges: with one copy of every text, BPE merges until every word is one token.
    core.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|eos|>", "<|system|>", "<|user|>", "<|assistant|>", "<image>"],
        clean_up_tokenization_spaces=False,
        padding_side="right",
        model_max_length=2048,
    )


def load_tokenizer() -> PreTrainedTokenizerFast:
    """Return the shipped tokenizer."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(TOKENIZER_FOLDER))


if __name__ == "__main__":
    build_tokenizer().save_pretrained(sys.argv[1] if len(sys.argv) > 1 else str(TOKENIZER_FOLDER))
