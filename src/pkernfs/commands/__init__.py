"""One module per command: ``configure(parser)`` adds its arguments, ``run(args)`` does it.

Heavy imports (the region, the core, pyfuse3) are inside ``run``: manual pages are made from the
parsers alone, and ``--help`` needs no extension module.
"""
