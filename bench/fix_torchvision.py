"""Lets a CUDA build of torchvision import beside a CPU build of torch: `python bench/fix_torchvision.py`.

Torchvision's Python part registers shapes for two operators of a library that cannot be loaded there; the patch
declares these operators first.
"""

import argparse
import importlib.util
from pathlib import Path

MARK = "import torchvision.extension  # noqa: F401\n"
DECLARED = """
if not torchvision.extension._has_ops():
    _declared = torch.library.Library("torchvision", "DEF")
    _declared.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def main() -> None:
    """Patch the installed torchvision, once."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise SystemExit("torchvision is not installed")
    path = Path(spec.origin).with_name("_meta_registrations.py")
    text = path.read_text(encoding="utf-8")
    if DECLARED in text:
        return
    if MARK not in text:
        raise SystemExit(f"{path} is not the file this script knows; it was written for torchvision 0.28")
    path.write_text(text.replace(MARK, MARK + DECLARED, 1), encoding="utf-8")


if __name__ == "__main__":
    main()
