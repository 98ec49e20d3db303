"""python -m moba_train: the same as the command moba-train."""

from moba_train.cli import main

main()
