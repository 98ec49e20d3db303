"""One file a verb of ``moba-train``. Each has ``main(arguments)``, which returns the exit code."""
