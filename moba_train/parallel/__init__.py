"""DeepSpeed: the engine of one rank, and the launch of all of them."""
