"""Checks the packages' annotations in tests (see `conftest.py`); an int is accepted where a float is due."""

import beartype

typechecked = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
