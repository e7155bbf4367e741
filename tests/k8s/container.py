"""The command and environment that a container has from its image, and how Kubernetes expands them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from atserving.local.examples import ROOT
from tests.k8s.dockerfile import chain, read


def expanded(text: str, environment: Mapping[str, str]) -> str:
    """Expand ``$(NAME)`` as Kubernetes does: unknown names stay as they are, and ``$$`` becomes ``$``."""
    return re.sub(
        r"\$(\$|\(([A-Za-z_][\w.-]*)\))",
        lambda found: "$" if found[1] == "$" else environment.get(found[2], found[0]),
        text,
    )


def image_config(image: str) -> tuple[list[str], dict[str, str]]:
    """Return ENTRYPOINT and ENV of one of our images, targets of the Dockerfile; nothing for other images."""
    stages = read((ROOT / "Dockerfile").read_text())
    name, _, _ = image.removeprefix("atserving/").partition(":")
    if not image.startswith("atserving/"):
        return [], {}
    inherited = chain(stages, name)
    (*_, entry_point) = [each.words() for stage in inherited for each in stage.all("ENTRYPOINT")]
    environment = {
        key: value for stage in inherited for each in stage.all("ENV") for key, value in each.pairs().items()
    }
    # The programs are in other folders here.
    return entry_point, {key: value for key, value in environment.items() if key != "PATH"}
