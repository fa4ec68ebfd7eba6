"""The adapter to SGLang: the only package that imports it.

Everything upstream-shaped ends here. The layers below take and return plain values, so a second
upstream release is a second adapter, not a second project.
"""
