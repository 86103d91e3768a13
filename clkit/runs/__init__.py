"""A run as settings and files: building it, loading its heads, merging, forgetting, exporting, comparing."""
