"""Script that computes features with onnxruntime from an exported file: python SCRIPT FILE PIXELS FEATURES."""

from __future__ import annotations

import json
import sys


def main(file: str, pixels: str, features: str) -> None:
    """Run every batch through the graph, write its outputs, and print the version of onnxruntime."""
    import onnxruntime
    from safetensors.numpy import load_file, save_file

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found = {
        f"{number}.{name}": tensor
        for number, images in load_file(pixels).items()
        for name, tensor in zip(names, session.run(names, {"images": images}), strict=True)
    }
    save_file(found, features)
    print(json.dumps({"onnxruntime": onnxruntime.__version__}))


if __name__ == "__main__":
    main(*sys.argv[1:])
