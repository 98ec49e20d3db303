"""Documents → token store → packed rows → this rank's batches."""
