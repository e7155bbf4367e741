"""Run a net in BVLC Caffe: `python caffe_program.py FOLDER`; see `oracles` for the folder's files.

Caffe is available for old Pythons only, so this program must run on Python 3.6 and import nothing of ours.
"""

import json
import os
import sys


def main(folder: str) -> int:
    os.environ.setdefault("GLOG_minloglevel", "2")
    try:
        import caffe  # type: ignore[import-not-found]
    except ImportError:
        return 3
    import numpy as np

    with open(os.path.join(folder, "request.json")) as file:
        request = json.load(file)
    net = caffe.Net(request["prototxt"], request["caffemodel"], caffe.TEST)
    for i, name in enumerate(request["inputs"]):
        array = np.load(os.path.join(folder, f"in_{i}.npy"))
        net.blobs[name].reshape(*array.shape)
        net.blobs[name].data[...] = array
    net.reshape()
    net.forward()
    for i, (blob, _, _) in enumerate(request["outputs"]):
        if blob in net.blobs:
            np.save(os.path.join(folder, f"out_{i}.npy"), net.blobs[blob].data)
    with open(os.path.join(folder, "version"), "w") as file:
        file.write(str(getattr(caffe, "__version__", "")))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
