"""How work is divided among ranks; needs no torch."""


def share(total: int, of_rank: int, of_world: int) -> tuple[int, int]:
    """The half-open range of ``total`` things that one rank owns; ranges tile the whole, uneven where they must be."""
    return total * of_rank // of_world, total * (of_rank + 1) // of_world
