"""Matrices that are the same numbers in memory."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from apd_lens.host._matrix import WeightMatrix


def merged_ties(matrices: Iterable[WeightMatrix], untied: set[str]) -> Iterable[WeightMatrix]:
    """Merges matrices that are the same numbers in memory, one the transpose of the other perhaps."""
    merged: dict[str, WeightMatrix] = {}
    first_at: dict[tuple[Any, ...], tuple[str, bool]] = {}  # place in memory -> name there, the other way round
    for matrix in matrices:
        place = None if matrix.name in untied else matrix.place_in_memory()
        if place not in first_at:
            merged[matrix.name] = matrix
            if place is not None:
                if len(place) == 4:  # a view, so that its transpose can be told
                    storage, offset, shape, stride = place
                    first_at[storage, offset, shape[::-1], stride[::-1]] = (matrix.name, True)
                first_at[place] = (matrix.name, False)
            continue
        name, transposed = first_at[place]
        first = merged[name]
        moved = [replace(use, matrix=name, transposed=use.transposed != transposed) for use in matrix.uses]
        merged[name] = replace(
            first,
            uses=(*first.uses, *moved),
            tied_to=(*first.tied_to, matrix.name, *matrix.tied_to),
            tied=(*first.tied, (matrix, transposed)),
        )
    return merged.values()


def with_decomposable_biases(matrices: Iterable[WeightMatrix]) -> list[WeightMatrix]:
    """The matrices, without the biases of tied ones and those that several share."""
    matrices = list(matrices)
    biases = [id(matrix.bias_parameter) for matrix in matrices if matrix.bias is not None]
    return [
        replace(matrix, bias=None, tied=tuple((replace(other, bias=None), turned) for other, turned in matrix.tied))
        if len(matrix.uses) > 1 or (matrix.bias is not None and biases.count(id(matrix.bias_parameter)) > 1)
        else matrix
        for matrix in matrices
    ]
