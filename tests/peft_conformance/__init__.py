"""PEFT's own test suite, run for `SORSAConfig`: `make test-peft`, `make test-peft-oldest`. Not part of `make test`.

`run.py` fetches the tests of the installed PEFT and starts pytest on them with `plugin.py`, which puts the lists of
`cases.py` where PEFT has its own and the tiny models of `local_hub.py` where PEFT downloads some.
"""
