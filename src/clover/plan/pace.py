"""How much of a card's rate each stage gets, and what a step costs besides.

Measured on one NVIDIA H200 (docs/benchmarks.md, "On a GPU") at the published sizes: stage 1 took
25 ms for 8 pairs and 50 for 36, which is a quarter of the rate of a large product and 18 ms of
kernels too small to fill the card; stage 2 before a 7B decoder 89 ms for 8 rows and 649 for 64;
the image encoder 938 images a second. Another card, or layers of another width, will differ.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pace:
    """What a stage makes of a card.

    Attributes:
        share: Of the rate of a large matrix product.
        fixed: Seconds a step beside its products.
    """

    share: float
    fixed: float = 0.0

    def seconds(self, operations: float, tflops: float, numbers: str = "bfloat16") -> float:
        """Return the seconds of a step of so many operations.

        Args:
            operations: Of its matrix products.
            tflops: 10^12 operations a second that a large product makes on the card in bfloat16.
            numbers: Format of the products.
        """
        rate = self.share * tflops * 1e12 * (_FLOAT32 if numbers == "float32" else 1)
        return self.fixed + operations / rate


_FLOAT32 = 0.1
"""Of the pace of bfloat16: 87 ms a step of stage 1 with 8 pairs."""
PACES = {
    "features": Pace(0.60),
    "align": Pace(0.25, 0.018),
    "tune": Pace(0.54, 0.009),
}
