"""Energy from operations and memory accesses, with the figures for 45 nm of Horowitz (2014)."""

from dataclasses import dataclass

import torch

from lightning_distill.hardware.latency import Numbers, numbers

PICOJOULES = {32: 4.6, 8: 0.3}
"""Of a multiplication and an addition: float32 is 3.7 + 0.9; int8 is 0.2 + 0.1, with the sum kept in int32."""
DRAM_NANOJOULES = 2.6
"""Of one 64-bit access to DRAM: the upper end of 1.3 to 2.6."""
ACCESS_BYTES = 8


@dataclass(frozen=True)
class EnergyReport:
    """Joules of a network: for its arithmetic, for its memory, and both."""

    compute: float
    memory: float

    @property
    def total(self) -> float:
        """Joules of arithmetic and memory together."""
        return self.compute + self.memory


def energy(
    ops: Numbers, picojoules: Numbers, *, bytes_moved: Numbers = 0.0, access_nanojoules: float = DRAM_NANOJOULES
) -> EnergyReport:
    """Energy of all layers: ``sum(ops * e_op) + sum(ceil(bytes / 8) * e_access)``.

    Args:
        ops: How many operations each layer has, counted in the unit that ``picojoules`` is for, at least 0. The
            figures of ``PICOJOULES`` are for a multiplication with its addition: count MACs with them.
        picojoules: Energy of one operation of each layer, at least 0; broadcasts with ``ops``.
        bytes_moved: Bytes that each layer reads and writes in DRAM, at least 0; an access moves 8 of them.
        access_nanojoules: Energy of one access, at least 0.

    Raises:
        ValueError: If a number is negative or not finite.

    Example:
        >>> energy([1e9, 2e9], [PICOJOULES[32], PICOJOULES[8]]).total
        0.0052
    """
    operations, each = torch.broadcast_tensors(numbers(ops, "ops"), numbers(picojoules, "picojoules"))
    accesses = (numbers(bytes_moved, "bytes_moved") / ACCESS_BYTES).ceil()
    access = numbers(access_nanojoules, "access_nanojoules")
    return EnergyReport(
        compute=float((operations * each).sum()) * 1e-12, memory=float((accesses * access).sum()) * 1e-9
    )
