"""Where a run stands in its stream, and what a checkpoint must hold so that it goes on from there."""
