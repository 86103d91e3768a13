"""A run as settings and files: built, loaded, merged, corrected, exported and compared."""
