"""What is kept of the manifests in ``docs/kubernetes/``: as they are rendered, for people to read and to compare.

``python -m tests.k8s.rendered`` writes them anew.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.k8s.manifests import K8S, ROOT

FOLDER = ROOT / "docs" / "kubernetes"
_EVALUATOR = [str(Path(sys.executable).parent / "atserving"), "k8s", "evaluator", "digits", "v1"]
COMMANDS = {
    "minimal.yaml": ["kubectl", "kustomize", str(K8S / "overlays" / "minimal")],
    "production.yaml": ["kubectl", "kustomize", str(K8S / "overlays" / "production")],
    "digits-v1.yaml": _EVALUATOR,
    "digits-v1-gpu.yaml": [*_EVALUATOR, "--gpu"],
}


def render(name: str) -> str:
    return subprocess.run(COMMANDS[name], check=True, capture_output=True, text=True).stdout


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in COMMANDS:
        (FOLDER / name).write_text(render(name))


if __name__ == "__main__":
    main()
