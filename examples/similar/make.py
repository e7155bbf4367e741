"""Make the release of the example app `digits-similar` from that of `digits` v1, and measure it.

    python -m examples.similar.make

The network ends at the embedding of `digits`, with the same weights. The tar also gets net.py. To measure the figures
in README.md, net.py compares held-out digits.
"""

import tarfile
import tempfile
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from examples.caffe_files import Array, write_tar
from examples.digit_pictures import load_split
from examples.scenes import png
from examples.similar import net

HERE = Path(__file__).parent
DIGITS = HERE.parent / "digits"
EXAMPLE = ("5.png", "5.jpg")  # in digits/images
AFTER_EMBEDDING = 'layer {\n  name: "drop3"\n'  # the first layer to leave out
THRESHOLD = 0.7


def release_files() -> dict[str, bytes]:
    with tarfile.open(DIGITS / "digits-v1.tar", "r:") as tar:
        opened = {name: tar.extractfile(name) for name in tar.getnames() if name != "labels.csv"}
        files = {name: file.read() for name, file in opened.items() if file is not None}
    prototxt = files["deploy.prototxt"].decode().replace('name: "digits-v1"', 'name: "digits-similar"', 1)
    files["deploy.prototxt"] = prototxt[: prototxt.index(AFTER_EMBEDDING)].encode()
    files["net.py"] = (HERE / "net.py").read_bytes()
    return files


def start(files: dict[str, bytes], folder: Path) -> dict[str, Any]:
    """Return the model from net.py's `net_init` for the release."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    model = net.net_init(
        {
            "tar_files": {name: str(folder / name) for name in files},
            "image_width": None,
            "use_device": "CPU",
            "batch_size": None,
            "custom_files": {},
            "custom_values": {},
            "model_params": {"intra_op_threads": 1},
        }
    )
    if model["error"]:
        raise SystemExit(model["error"])
    return model


def embeddings(model: dict[str, Any], images: list[bytes]) -> Array:
    """Return the images' embeddings (n, 64), requested in groups of two as by a client."""
    reqs = [
        net.net_preprocess(model, {"data": [{"body": first}, {"body": second}], "params": {"format": "stream"}})
        for first, second in zip(images[::2], images[1::2], strict=True)
    ]
    rets = net.net_inference(model, {"reqid": "measure", "reqs": reqs})
    return np.concatenate([np.frombuffer(ret["result_file"], "<f4").reshape(2, -1) for ret in rets])


def similarity_of(model: dict[str, Any], first: bytes, second: bytes) -> float:
    req = net.net_preprocess(model, {"data": [{"body": first}, {"body": second}]})
    similarity: float = net.net_inference(model, {"reqid": "measure", "reqs": [req]})[0]["result"]["similarity"]
    return similarity


def main() -> None:
    files = release_files()
    tar = HERE / "digits-similar-v1.tar"
    write_tar(tar, files)

    split = load_split()
    with tempfile.TemporaryDirectory() as folder:
        model = start(files, Path(folder))
        vectors = embeddings(model, [png(picture) for picture in split.test])
        first_five, second_five = ((DIGITS / "images" / name).read_bytes() for name in EXAMPLE)
        example = similarity_of(model, first_five, second_five)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    first, second = np.triu_indices(len(vectors), 1)
    similarity = (vectors @ vectors.T)[first, second]
    same = split.test_labels[first] == split.test_labels[second]
    values: dict[str, object] = {
        "first_example": EXAMPLE[0],
        "second_example": EXAMPLE[1],
        "example": f"{example:.4f}",
        "same": f"{np.median(similarity[same]):.2f}",
        "different": f"{np.median(similarity[~same]):.2f}",
        "same_above": f"{(similarity[same] > THRESHOLD).mean():.1%}",
        "different_above": f"{(similarity[~same] > THRESHOLD).mean():.1%}",
        "threshold": THRESHOLD,
        "pairs": len(similarity),
        "test": len(split.test),
        "numbers": vectors.shape[1],
        "bytes": 2 * 4 * vectors.shape[1],
        "kilobytes": f"{tar.stat().st_size / 1000:.0f}",
    }
    (HERE / "README.md").write_text(Template((HERE / "README.template.md").read_text()).substitute(values))
    print(values)


if __name__ == "__main__":
    main()
