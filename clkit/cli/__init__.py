"""The ``clkit`` command."""
