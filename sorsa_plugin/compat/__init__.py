"""Private API of other packages, one file a package: the only places that a new release of one of them can break.

Every entry says in which versions it was seen, what for, and what to do when it goes. A test touches each.
"""
