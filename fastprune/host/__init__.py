"""The machine and its processes: files, cache folder, ranks, errors and suggestions for users."""
