"""What the ensemble is measured against: floors, and other ways to do the same, each in a process of its own.

A rival answers one command a line on its standard input (`child.py`), so that all of them can be loaded at once and
take turns.
"""
