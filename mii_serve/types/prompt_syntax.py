"""How a prompt is read: as plain text, or by AUTOMATIC1111's rules for weights and breaks.

Those rules, as its documentation gives them ("Attention/emphasis"): `(word)` weighs a word 1.1 times as much, `[word]` as much
less, `(word:1.3)` 1.3 times as much, and brackets nest. A bracket after a backslash is text, and so is a closing one
that nothing opens; what is not closed lasts to the end. The word BREAK ends a chunk of tokens.

Reading is linear in the text's length, whatever it holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from mii_serve.errors import InvalidRequestError

PLAIN, A1111 = "plain", "a1111"
PROMPT_SYNTAXES = (PLAIN, A1111)

MAX_WEIGHT = 10.0
"""Of a part of a prompt, above and below zero."""

MAX_CHUNKS = 8
"""Of one prompt: 600 tokens."""

_BRACKET = 1.1
_TOKEN = re.compile(r"\\[\\()\[\]]|:\s*(?P<weight>[+-]?[.\d]+)\s*\)|[()\[\]]|[^\\()\[\]:]+|[\\:]")
_BREAK = re.compile(r"\bBREAK\b")


@dataclass(frozen=True, slots=True)
class WeightedText:
    """A part of a prompt."""

    text: str = field(repr=False)
    weight: float = 1.0


BREAK = WeightedText("BREAK", 0.0)
"""Not a text: what follows is in the next chunk."""


def parse_a1111(name: str, prompt: str) -> list[WeightedText]:
    """The parts of a prompt, and `BREAK` between some of them; neighbours of one weight are one part. `name` is for errors.

    Raises:
        InvalidRequestError: a weight is out of bounds or no number, or there are too many breaks.
    """
    pieces = _pieces(name, prompt)
    if sum(piece.kind == "BREAK" for piece in pieces) >= MAX_CHUNKS:
        raise InvalidRequestError(name, f"must have fewer than {MAX_CHUNKS} BREAKs")
    parts: list[tuple[list[str], float] | None] = []  # None is a break
    factors, num_square = [1.0], 0
    for piece in pieces:
        match piece.kind:
            case "(":
                factors.append(factors[-1] * piece.factor)
            case ")":
                factors.pop()
            case "[":
                num_square += 1
            case "]":
                num_square -= 1
            case "BREAK":
                parts.append(None)
            case _:
                weight = _checked(name, factors[-1] * _BRACKET**-num_square, piece.text)
                if parts and (last := parts[-1]) is not None and last[1] == weight:
                    last[0].append(piece.text)
                else:
                    parts.append(([piece.text], weight))
    return [BREAK if part is None else WeightedText("".join(part[0]), part[1]) for part in parts]


def text_read(syntax: str, prompt: str) -> str:
    """What the text encoder reads of a prompt: without the brackets, weights and backslashes that could hide a word."""
    if syntax == PLAIN:
        return prompt
    return "".join("\n" if part is BREAK else part.text for part in parse_a1111("prompt", prompt))


@dataclass(slots=True)
class _Piece:
    """A text, a bracket that counts, or a BREAK. `factor` is that of an opening round bracket."""

    kind: str
    text: str = ""
    factor: float = _BRACKET


def _pieces(name: str, prompt: str) -> list[_Piece]:
    pieces: list[_Piece] = []
    round_ones: list[_Piece] = []
    num_square = 0
    for match in _TOKEN.finditer(prompt):
        token, weight = match[0], match["weight"]
        is_end = weight is not None or token == ")"
        if token == "(":
            round_ones.append(_Piece("("))
            pieces.append(round_ones[-1])
        elif is_end and round_ones:
            opening = round_ones.pop()
            if weight is not None:
                opening.factor = _number(name, weight)
            pieces.append(_Piece(")"))
        elif token == "[" or (token == "]" and num_square):
            num_square += 1 if token == "[" else -1
            pieces.append(_Piece(token))
        else:
            pieces += _texts(token.removeprefix("\\") if token != "\\\\" else "\\")
    return pieces


def _texts(text: str) -> Iterator[_Piece]:
    before, *others = _BREAK.split(text)
    yield _Piece("text", before.rstrip() if others else before)
    for i, part in enumerate(others):
        yield _Piece("BREAK")
        yield _Piece("text", part.lstrip() if i == len(others) - 1 else part.strip())


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InvalidRequestError(name, "must have numbers as weights", repr(text[:20])) from None


def _checked(name: str, weight: float, text: str) -> float:
    if not abs(weight) <= MAX_WEIGHT:
        raise InvalidRequestError(
            name, f"must weigh each part in [-{MAX_WEIGHT:g}, {MAX_WEIGHT:g}]", f"{weight:.3g} for {text[:20]!r}"
        )
    return weight
