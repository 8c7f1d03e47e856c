"""How far two computations may lie apart when all that differs is the order in which a kernel adds."""

import torch


def tolerance(dtype: torch.dtype, num_terms: int) -> float:
    """Bound the rounding of two sums of equal terms, relative to the sum of the terms' sizes.

    A sum of n products has n roundings of half an epsilon each, whatever its order, so two orders differ by at most n
    epsilons: no processor, library or number of threads goes beyond that. Of sums that feed sums, add the numbers of
    terms. Where a comparison can be made in float64 it should be; this is for what must be in a shorter type.
    """
    return num_terms * torch.finfo(dtype).eps
