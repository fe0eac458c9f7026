"""Writers of the runtimes' files."""
