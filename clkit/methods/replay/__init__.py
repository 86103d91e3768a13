"""What replay is: the memory and its rows, the losses, the views, the batch norms."""

from clkit.methods.replay.buffer import MemoryRows, ReservoirBuffer

__all__ = ["MemoryRows", "ReservoirBuffer"]
