"""How far two computations may lie apart when all that differs is the order in which a kernel adds."""

import torch
from torch import Tensor


def tolerance(dtype: torch.dtype, num_terms: int) -> float:
    """Bound the rounding of two sums of equal terms, relative to the sum of the terms' sizes.

    A sum of n products has n roundings of half an epsilon each, whatever its order, so two orders differ by at most n
    epsilons: no processor, library or number of threads goes beyond that. Of sums that feed sums, add the numbers of
    terms. Where a comparison can be made in float64 it should be; this is for what must be in a shorter type.
    """
    return num_terms * torch.finfo(dtype).eps


def assert_as_near(actual: Tensor, reference: Tensor, exact: Tensor) -> None:
    """Compare two computations in a short type by how far from the exact result each lies, on the average of squares.

    For types so short that the bound of `tolerance` lets everything through. Half as far again is allowed: the
    roundings of either are as good as random, and over some hundred numbers their mean varies by a few percent.
    """
    distance, allowed = ((found.to(exact) - exact).square().mean().sqrt() for found in (actual, reference))
    assert distance <= 1.5 * allowed, f"{distance} from the exact result, and the reference {allowed}"
