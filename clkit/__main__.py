"""``python -m clkit`` is the ``clkit`` command."""

from clkit.cli import main

raise SystemExit(main())
