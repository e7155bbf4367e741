"""Run a net in OpenCV's dnn module: `python opencv_program.py FOLDER`; see `oracles` for the folder's files."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(folder: Path) -> int:
    try:
        import cv2
    except ImportError:
        return 3
    import numpy as np

    request = json.loads((folder / "request.json").read_text())
    if not hasattr(cv2.dnn, "readNetFromCaffe"):
        raise RuntimeError(f"error: OpenCV {cv2.__version__} cannot read Caffe nets; install a 4.x version")
    net = cv2.dnn.readNetFromCaffe(request["prototxt"], request["caffemodel"])
    for i, name in enumerate(request["inputs"]):
        net.setInput(np.load(folder / f"in_{i}.npy"), name)
    known = set(net.getLayerNames())
    # OpenCV addresses a blob by the layer that produces it, and names some layers after the blob.
    wanted = [
        (i, layer if layer in known else blob, top)
        for i, (blob, layer, top) in enumerate(request["outputs"])
        if layer in known or blob in known
    ]
    for (i, _, top), tops in zip(wanted, net.forwardAndRetrieve([name for _, name, _ in wanted]), strict=True):
        if top < len(tops):
            np.save(folder / f"out_{i}.npy", tops[top])
    (folder / "version").write_text(cv2.__version__)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
