"""Fuzzing of what meets data from outside: `forward` and `load_state_dict`.

`forward.one_run` and `load_state_dict.one_run` turn any bytes into a scenario and raise where a
property does not hold. `make fuzz` drives them by atheris, guided by coverage of the package;
tests/hardening/test_fuzz.py by random bytes.
"""
