"""The loss and the oracle inside other people's trainers: one module a trainer, imported only when asked for.

A module imports its trainer when it is imported or registered, never before; see docs/adapters.md.
"""
