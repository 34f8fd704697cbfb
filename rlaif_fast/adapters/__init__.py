"""The loss and the oracle inside other trainers: one module per trainer, imported only on request.

A module imports its trainer only when it is itself imported or registered; see docs/adapters.md.
"""
