"""Slices: features with models, losses, an evaluator and programs of their own, a folder each.

The other packages do not import them; tables of names say where their parts are (README.md of
each).
"""
