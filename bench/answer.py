"""The right answer to a picture, and whether a server gave it."""

from __future__ import annotations

import re
from dataclasses import dataclass

# The mesh's answers hold it somewhere inside, those of the peers are nothing else.
_SAID = re.compile(rb'"index": ?(\d+)[^{}]*"score": ?([-+.\deE]+)')
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Answer:
    """The best class of a picture and its score. A batch of one picture again and again has ``count`` of them."""

    index: int
    score: float
    count: int = 1

    def is_in(self, body: bytes) -> bool:
        """Whether the body of a response says this, and nothing else."""
        said = _SAID.findall(body)
        return len(said) == self.count and all(
            int(index) == self.index and abs(float(score) - self.score) <= _TOLERANCE for index, score in said
        )
