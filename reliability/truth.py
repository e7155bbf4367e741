"""The right answers of each release, asked of a mesh that nobody disturbs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import aiohttp

from atserving.errors import StartError
from reliability.mesh import Mesh
from reliability.releases import PICTURES

_TOLERANCE = 1e-5

Truth = Mapping[str, Mapping[str, list[float]]]
"""By app and version: for each picture the score of its digit."""


async def learn(mesh: Mesh) -> Truth:
    """Ask every classifier for every picture. Raises StartError if digits v1 or v2 takes one for another digit."""
    truth: dict[str, dict[str, list[float]]] = {}
    async with aiohttp.ClientSession() as session:
        for each in mesh.serves:
            if not each.classifies:
                continue
            scores = truth.setdefault(each.app, {}).setdefault(each.version, [])
            for digit, picture in PICTURES.items():
                url = f"{mesh.edges[0]}/v1/eval/{each.app}/{each.version}"
                headers = {"content-type": "application/octet-stream"}
                async with session.post(url, data=picture, headers=headers) as response:
                    best = (await response.json())["result"]["confidences"][0]
                if best["index"] != digit:
                    raise StartError(f"{each.app} {each.version} takes the picture of {digit} for {best['index']}")
                scores.append(best["score"])
    return truth


def versions_that_say(truth: Truth, app: str, digit: int, result: Any) -> list[str]:
    """Return the versions of an app whose right answer to a picture is ``result``."""
    best = result["confidences"][0] if isinstance(result, dict) and result.get("confidences") else {}
    if best.get("index") != digit:
        return []
    return [version for version, scores in truth[app].items() if abs(scores[digit] - best["score"]) <= _TOLERANCE]
