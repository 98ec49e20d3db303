"""Before a run: the memory and the time of a recipe's steps, predicted from its settings alone. Needs no GPU."""
