"""Prompts to token ids, and the one place that knows how a sequence is laid out.

    position   0      1 .. 256 V    +1       +1                 L - 1                 N            1
              [BOS] [ patches  ] [state] [context] [rest of prompt ... empty] [action slots] [stop]
    read                                                             ^^^^^^^^^^^^^^^^^^^^ N rows: each row predicts the NEXT slot

Attention is bidirectional, so a row's place in memory is free as long as its position id is right. Shorter prompts of a batch are padded on
the LEFT, and the padding moves to the very front of the sequence: the rows that are read then lie at the same indices for every sample, and
the real rows lie side by side, as the fastest attention kernels want them.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

PROMPTS = {
    "openvla": "In: What action should the robot take to {instruction}?\nOut:",
    "plain": "{instruction}",
    "blind": "act",  # the instruction is never read: the control for language grounding
}
PromptStyle = Literal["openvla", "plain", "blind"]

CACHED_PROMPTS = 4096
NUM_ACTION_IDS = 256
WORD_BOUNDARY = "\u2581"
SPECIAL = ("<unk>", "<s>", "</s>", "<PAD>")
BYTES = tuple(f"<0x{i:02X}>" for i in range(256))
LETTERS = (WORD_BOUNDARY, *"abcdefghijklmnopqrstuvwxyz")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Special ids of a vocabulary. `empty` is the lone word-boundary piece that ends every prompt (29871 in Llama-2's vocabulary);
    action tokens count down from `num_tokens` - 1 (31999, 31998, ... in Llama-2's)."""

    bos: int
    stop: int
    pad: int
    empty: int
    num_tokens: int


class PromptEncoder:
    """Instructions to padded ids, with a cache: a robot repeats the same few instructions.

    verbatim: keep white space around an instruction, as the reference does.
    """

    def __init__(self, tokenizer: Tokenizer, config: Config, style: PromptStyle, *, verbatim: bool = False) -> None:
        self.tokenizer, self.config, self.style, self.verbatim = tokenizer, config, style, verbatim
        self._cache: dict[str, list[int]] = {}

    def ids(self, instruction: str) -> list[int]:
        """Token ids of the prompt WITHOUT the leading BOS, ending in the empty token."""
        if instruction not in self._cache:
            if len(self._cache) >= CACHED_PROMPTS:
                self._cache.clear()
            text = PROMPTS[self.style].format(instruction=(instruction if self.verbatim else instruction.strip()).lower())
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
            if not ids or ids[-1] != self.config.empty:
                ids.append(self.config.empty)
            self._cache[instruction] = ids
        return self._cache[instruction]

    def __call__(self, instructions: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """ids int64 (B, L) padded on the left, mask bool (B, L) True at real tokens."""
        rows = [self.ids(text) for text in instructions]
        length = max(map(len, rows))
        ids = np.full((len(rows), length), self.config.pad, np.int64)
        for i, row in enumerate(rows):
            ids[i, length - len(row) :] = row
        return ids, np.arange(length)[None] >= length - np.array([len(r) for r in rows])[:, None]


def train_tokenizer(corpus: list[str], vocab_size: int) -> tuple[Tokenizer, Config]:
    """A small Llama-shaped tokenizer (BPE over word-boundary pieces, byte fallback) for small models.

    Words of the corpus become single tokens when `vocab_size` allows; every other text is encoded through its letters and bytes. The 256
    highest ids stay free for action tokens.
    """
    least = NUM_ACTION_IDS + len(BYTES) + len(SPECIAL) + len(LETTERS)
    if vocab_size < least:
        needs = f"{NUM_ACTION_IDS} action ids, {len(BYTES)} bytes, {len(SPECIAL)} special tokens and {len(LETTERS)} letters"
        raise ValueError(f"vocab_size={vocab_size} is too small: {needs} need at least {least}")
    splitter = pre_tokenizers.Metaspace(replacement=WORD_BOUNDARY, prepend_scheme="first")
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.pre_tokenizer = splitter
    alphabet = _alphabet(corpus, len(LETTERS) + (vocab_size - least) // 2)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - NUM_ACTION_IDS - len(BYTES),
        special_tokens=list(SPECIAL),
        show_progress=False,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
    )
    learner.train_from_iterator(corpus, trainer)
    learned = json.loads(learner.to_str())["model"]
    reserved = {*SPECIAL, *BYTES}  # text that spells one of these out must not become it
    pieces = [*SPECIAL, *BYTES, *(p for p in sorted(learned["vocab"], key=learned["vocab"].get) if p not in reserved)]
    assert len(pieces) <= vocab_size - NUM_ACTION_IDS
    vocab = {piece: i for i, piece in enumerate(pieces)}
    pairs = [m.split(" ") if isinstance(m, str) else m for m in learned["merges"]]  # text before tokenizers 0.20
    merges = [(left, right) for left, right in pairs if left + right not in reserved]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(replacement=WORD_BOUNDARY, prepend_scheme="first")])
    return tokenizer, Config(bos=vocab["<s>"], stop=vocab["</s>"], pad=vocab["<PAD>"], empty=vocab[WORD_BOUNDARY], num_tokens=vocab_size)


def _alphabet(corpus: list[str], size: int) -> list[str]:
    """At most `size` characters: `LETTERS`, then the corpus's most frequent others. The trainer's own limit breaks ties at random."""
    counts = Counter(character for text in corpus for character in text.replace(" ", WORD_BOUNDARY))
    others = sorted(counts.keys() - set(LETTERS), key=lambda character: (-counts[character], character))
    return [*LETTERS, *others[: size - len(LETTERS)]]


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read `tokenizer.json`. Raises ValueError when the checkpoint has none."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no tokenizer.json: not a complete checkpoint; import or download it again")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library has no type of its own for a broken file
        raise ValueError(f"{path} is not a tokenizer ({error}); copy or download it again") from None
    tokenizer.no_padding()  # stored settings of somebody's last batch would change every prompt
    tokenizer.no_truncation()
    return tokenizer
