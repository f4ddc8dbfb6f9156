"""Imported by each of SGLang's processes at its start: what has to be there before anything else is imported."""

import copies
import torch

if not torch.cuda.is_available():
    # torchvision's wheel is built for CUDA: beside a CPU build of torch its library does not load, and it then fails
    # to import where it describes two operators that the library would have defined.
    _torchvision = torch.library.Library("torchvision", "DEF")
    _torchvision.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _torchvision.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

    class _Cudart:
        """Host pools register their memory with CUDA, which has nothing to do here."""

        def cudaHostRegister(self, address: int, size_bytes: int, flags: int) -> int:  # noqa: N802 (CUDA's name)
            return 0

        def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
            return 0

    torch.cuda.cudart = _Cudart
    copies.install()
