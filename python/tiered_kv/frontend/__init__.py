"""SGLang's frontend language on a server with `--tiered-kv`: each run of a function is a program.

`endpoint.py` is what programs use (docs/frontend.md), and the only file outside `plugin/` that
imports SGLang: its frontend, which runs where the caller is and not in a server.
"""
