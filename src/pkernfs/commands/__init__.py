"""One module per command: ``configure(parser)`` adds its arguments, ``run(args)`` runs it.

Heavy imports (the region, the core, pyfuse3) are inside ``run``. So the parsers alone make the
manual pages, and ``--help`` needs no extension module.
"""
