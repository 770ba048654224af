"""Private API of other packages, one file a package: the only places that a new release of one of them can break.

Every entry says in which versions it was seen, its purpose, and what to do if it disappears. A test touches each entry.
"""
