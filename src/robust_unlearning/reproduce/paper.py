"""The numbers that the paper prints (arXiv 2501.19202v3), on Zephyr-7B-β. In %, by method as tables call it."""

from __future__ import annotations

REPRESENTATION = ("RMU", "Adaptive RMU", "RSV")
PREFERENCE = ("NPO+KL", "NPO+MSE", "DPO+KL", "DPO+MSE", "SimNPO+KL", "SimNPO+MSE")
METHODS = (*REPRESENTATION, *PREFERENCE)


def _by_method(*values: float) -> dict[str, float]:
    return dict(zip(METHODS, values, strict=True))


REDUCTION = _by_method(19.0, 30.2, 20.8, 50.9, 27.8, 31.8, 58.4, 44.4, 47.9)
"""Section 6.2: share of perturbed MMLU's accuracy that unlearning costs."""
RECOVERY = _by_method(34.2, 81.7, 83.2, 60.9, 18.5, 32.9, 91.4, 32.3, 74.2)
"""Section 6.2: share of it that RNA wins back."""
AVERAGE = {"reduction": (23.3, 43.3), "recovery": (66.3, 51.7)}
"""The paper's averages over representation and over preference methods."""
NOISE = {
    2: _by_method(3.0, 8.0, 5.0, 1.4, 1.4, 1.8, 1.0, 1.4, 1.8),
    4: _by_method(3.0, 7.0, 5.0, 1.2, 1.8, 1.8, 2.0, 1.4, 1.6),
    8: _by_method(3.0, 8.0, 5.0, 1.4, 1.8, 1.8, 2.0, 1.4, 1.6),
    16: _by_method(3.0, 6.0, 5.0, 1.4, 1.6, 1.8, 2.0, 1.4, 1.6),
}
"""Table 1: selected ν in hundredths, by length of the n-grams."""
NOISE_KEYWORD = _by_method(3.0, 8.0, 9.0, 1.4, 1.0, 1.0, 2.0, 1.4, 1.8)
"""Appendix A.4: selected ν in hundredths for SARS-CoV-2; not the 2-grams' in RSV, NPO+MSE, DPO+KL, DPO+MSE."""
WMDP = _by_method(28.7, 28.6, 28.3, 27.2, 26.2, 27.1, 26.0, 26.8, 27.1)
MMLU = _by_method(57.0, 56.6, 56.3, 55.8, 56.2, 53.7, 53.5, 55.9, 55.9)
"""Tables 2 to 5: accuracies without RNA."""
WMDP_RNA = _by_method(28.7, 30.0, 30.9, 27.7, 28.0, 29.7, 28.9, 27.6, 28.7)
MMLU_RNA = _by_method(57.0, 56.4, 56.5, 55.5, 56.1, 54.1, 53.6, 55.6, 56.0)
"""Table 2 (2-grams): accuracies with RNA."""
PERTURBED = {
    2: _by_method(52.7, 49.3, 53.0, 25.2, 44.3, 48.3, 27.4, 33.7, 29.4),
    4: _by_method(48.3, 44.4, 49.9, 24.6, 39.2, 42.4, 26.1, 31.9, 30.1),
    8: _by_method(44.6, 42.0, 46.4, 29.6, 37.2, 39.8, 29.1, 32.7, 29.6),
    16: _by_method(41.8, 39.8, 43.7, 31.2, 36.3, 35.9, 32.6, 34.1, 33.2),
}
PERTURBED_RNA = {
    2: _by_method(52.1, 54.7, 56.4, 48.1, 47.7, 50.2, 52.0, 47.0, 54.8),
    4: _by_method(47.5, 50.0, 54.2, 42.5, 40.4, 43.7, 55.6, 38.1, 53.4),
    8: _by_method(42.8, 54.7, 48.1, 39.0, 37.2, 41.5, 54.0, 36.2, 46.1),
    16: _by_method(41.4, 50.0, 44.2, 38.2, 36.7, 36.5, 52.2, 36.7, 44.4),
}
"""Tables 2 to 5: perturbed MMLU by length of the n-grams, without and with RNA."""
PRINTED_GAINS = {
    (2, "SimNPO+KL"): 6.3,
    (4, "RSV"): 4.9,
    (8, "Adaptive RMU"): 5.4,
    (8, "SimNPO+KL"): 3.7,
    (16, "Adaptive RMU"): 5.6,
}
"""Gains on perturbed MMLU that the tables print beside accuracies which differ by something else; in all other rows the
printed gain is the difference. Adaptive RMU's rows with RNA at 8 and 16 words repeat those at 2 and 4 words in print.
"""


def gain(length: int, title: str) -> float:
    """The difference of a method's two accuracies on perturbed MMLU, in points: RNA less none."""
    return PERTURBED_RNA[length][title] - PERTURBED[length][title]
