"""Random additions to a prompt: Somepalli et al., "Understanding and mitigating copying in diffusion models", 2023."""

from __future__ import annotations

import random
from typing import Any

NUMBERS = 100_000


def random_tokens(text: str, count: int, tokenizer: Any, drawn: random.Random) -> str:
    """`text` with `count` tokens, each decoded from any id below those of SOT and EOT, between its words."""
    ids = range(min(tokenizer.bos_token_id, tokenizer.eos_token_id))
    return _inserted(text, [tokenizer.decode([drawn.choice(ids)]) for _ in range(count)], drawn)


def random_numbers(text: str, count: int, tokenizer: Any, drawn: random.Random) -> str:
    """`text` with `count` numbers from 0 to 99,999 between its words."""
    return _inserted(text, [str(drawn.randrange(NUMBERS)) for _ in range(count)], drawn)


def _inserted(text: str, additions: list[str], drawn: random.Random) -> str:
    words = text.split(" ")
    for addition in additions:
        words.insert(drawn.randint(0, len(words)), addition)
    return " ".join(words)
