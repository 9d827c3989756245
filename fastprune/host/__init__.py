"""What the package needs of the machine and its processes: files, cache folder, ranks."""
