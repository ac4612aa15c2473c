#!/usr/bin/env python3
"""Writes tokenizer_ids.json: small vocabularies, tricky texts, and their token ids by other implementations.

    pip install regex==2026.11.19 sentencepiece==0.2.3 && python3 tokenizer_ids.py > tokenizer_ids.json

Byte-level BPE is written out below in plain Python over the package `regex`: nothing of the Rust tokenizers. Its
merges are trained without cutting the text into words, so that they cross every place where some model cuts.
SentencePiece vocabularies are trained and applied by SentencePiece itself.
"""

import io
import json
import sys
import unicodedata

import regex
import sentencepiece

TEXTS = [
    "", " ", "   ", "Hello world", " Hello  world  ", "I'm you're WE'LL it's they'D", "12345 3.14159 1,000,000 x2", "5²½ⅧⅨ 1²3",
    "a\nb\r\n\n\n c\t\td \n", "naïve café déjà vu, Ελληνικά, русский", "日本語のテキスト。漢字", "한국어 텍스트",
    "😀👩‍👩‍👧‍👦🇫🇷 emoji", "def f(x):\n    return x**2  # comment\n\n\tif x:\n", "e\u0301 and \u00e9",
    "\u200b zero width\u00a0space", "العربية हिन्दी ไทย", "!!!???...--- /path/to/file\n/",
    "camelCaseString HTTPServer snake_case", "\u0001control", "Hello<|end|>world <tool>12</tool> world<|end|>",
]  # fmt: skip
SPECIAL = ["<|begin|>", "<|end|>"]
USER_DEFINED = ["<tool>", "</tool>"]
MERGES = 260

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# name: (expressions applied one after the other, NFC first, whole words before merges)
PRE_TOKENIZERS = {
    "gpt-2": ([GPT2], False, False),
    "smollm": ([r"\p{N}|[^\p{N}]+", GPT2], False, False),
    "qwen2": ([rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{REST}"], True, False),
    "llama-bpe": ([rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{REST}"], False, True),
    "tekken": (
        [
            rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ],
        False,
        True,
    ),
}


def byte_characters():
    """GPT-2's printable character for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


BYTES = byte_characters()


def spell(text):
    return [BYTES[byte] for byte in text.encode("utf-8")]


def join(parts, pair):
    joined, i = [], 0
    while i < len(parts):
        if i + 1 < len(parts) and (parts[i], parts[i + 1]) == pair:
            joined.append(parts[i] + parts[i + 1])
            i += 2
        else:
            joined.append(parts[i])
            i += 1
    return joined


def train():
    """Merges of the most frequent pair of neighbours in the texts, ties by the pair itself."""
    texts = [unicodedata.normalize("NFC", text) for text in TEXTS if "<" not in text]
    words = [spell(text) for text in texts + ["Hello world 123 the theses"] * 3]
    merges = []
    while len(merges) < MERGES:
        counts = {}
        for word in words:
            for pair in zip(word, word[1:]):
                counts[pair] = counts.get(pair, 0) + 1
        # A text joined twice to one token by different ways would be in the vocabulary twice.
        known = {left + right for left, right in merges}
        best = max((pair for pair in counts if "".join(pair) not in known), key=lambda pair: (counts[pair], pair))
        merges.append(best)
        words = [join(word, best) for word in words]
    return merges


def encode(text, ids, merges, name):
    expressions, nfc, whole_words = PRE_TOKENIZERS[name]
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    result = []
    for part in regex.split("(" + "|".join(map(regex.escape, SPECIAL + USER_DEFINED)) + ")", text):
        if part in SPECIAL + USER_DEFINED:
            result.append(ids[part])
            continue
        words = [unicodedata.normalize("NFC", part) if nfc else part]
        for expression in expressions:
            words = [match.group() for word in words for match in regex.finditer(expression, word)]
        for word in words:
            spelled = spell(word)
            if whole_words and "".join(spelled) in ids:
                result.append(ids["".join(spelled)])
                continue
            while pairs := [pair for pair in zip(spelled, spelled[1:]) if pair in ranks]:
                spelled = join(spelled, min(pairs, key=ranks.get))
            result += [ids[token] for token in spelled]
    return result


def byte_level():
    merges = train()
    tokens = SPECIAL + sorted(BYTES.values()) + [left + right for left, right in merges] + USER_DEFINED
    ids = {token: index for index, token in enumerate(tokens)}
    assert len(ids) == len(tokens)
    types = [3 if t in SPECIAL else 4 if t in USER_DEFINED else 1 for t in tokens]
    return {
        "tokens": tokens,
        "types": types,
        "merges": [f"{left} {right}" for left, right in merges],
        "ids": {name: [encode(text, ids, merges, name) for text in TEXTS] for name in PRE_TOKENIZERS},
    }


def sentence_piece(prefix):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text.replace("\n", " ") for text in TEXTS if text.strip()] * 4),
        model_writer=model,
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = range(processor.get_piece_size())

    def kind(piece):
        if processor.is_unknown(piece):
            return 2
        return 3 if processor.is_control(piece) else 6 if processor.is_byte(piece) else 1

    return {
        "add_space_prefix": prefix,
        "tokens": [processor.id_to_piece(piece) for piece in pieces],
        "scores": [processor.get_score(piece) for piece in pieces],
        "types": [kind(piece) for piece in pieces],
        # SentencePiece does not look for special tokens in a text.
        "ids": [None if "<" in text else processor.encode(text) for text in TEXTS],
    }


if __name__ == "__main__":
    golden = {
        "texts": TEXTS,
        "byte_level": byte_level(),
        "sentencepiece": [sentence_piece(True), sentence_piece(False)],
    }
    json.dump(golden, sys.stdout, ensure_ascii=True, separators=(",", ":"))
    print()
