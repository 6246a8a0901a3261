"""Learns the CLIP byte-level BPE tokenizer of the demo world, in the file format of Stable Diffusion v1-4.

All 256 bytes are in the vocabulary, so any UTF-8 prompt has tokens.
"""

from __future__ import annotations

import collections
import itertools
import json
from pathlib import Path

from transformers import CLIPTokenizer

from .world import captions

MAX_TOKENS = 77
NUM_MERGES = 700
NUM_CAPTIONS = 20_000
MIN_WORD_COUNT = 15
EVERYDAY_WORDS = tuple(
    """
    a an the of in on at with and or by to for from is under over near one two three four photo picture image painting
    drawing sketch icon realistic beautiful background landscape mountain mountains sky sea ocean river forest castle
    city street man woman person people child dog cat horse bird fish astronaut riding mars robot car boat flower
    flowers sunset night day summer winter snow rain light dark bright high quality detailed digital art style oil
    watercolor portrait cute old new standing sitting running playing wearing hat red table chair book
    """.split()  # noqa: SIM905
)
START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"

Word = tuple[str, ...]


def _byte_symbols() -> list[str]:
    """The printable stand-ins of the 256 bytes, in the order of the GPT-2 and CLIP vocabularies."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(code) for code in printable] + [chr(256 + i) for i in range(len(others))]


def _word_counts() -> dict[Word, int]:
    seen: collections.Counter[str] = collections.Counter()
    for caption in captions(seed=3, count=NUM_CAPTIONS):
        seen.update(caption.text.replace(",", " ").lower().split())
    counts = {word: count for word, count in seen.items() if count >= MIN_WORD_COUNT}  # drops the nonsense words
    for word in EVERYDAY_WORDS:
        counts[word] = max(counts.get(word, 0), 20)
    return {(*word[:-1], word[-1] + WORD_END): count for word, count in counts.items() if word.isascii()}


def _merged(word: Word, pair: tuple[str, str]) -> Word:
    symbols, i = [], 0
    while i < len(word):
        if word[i : i + 2] == pair:
            symbols.append(word[i] + word[i + 1])
            i += 2
        else:
            symbols.append(word[i])
            i += 1
    return tuple(symbols)


def _learn_merges(words: dict[Word, int]) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    while len(merges) < NUM_MERGES:
        pairs: collections.Counter[tuple[str, str]] = collections.Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        words = {_merged(word, best): count for word, count in words.items()}
    return merges


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Learn the tokenizer, write it to `folder` and return it as loaded from there."""
    symbols = _byte_symbols()
    merges = _learn_merges(_word_counts())
    tokens = [*symbols, *(s + WORD_END for s in symbols), *(a + b for a, b in merges), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_TOKENS, "do_lower_case": True, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)
