"""``python -m clkit`` is the ``clkit`` command."""

from clkit.cli.main import main

raise SystemExit(main())
