"""Kernels that move bytes: they know frames and addresses, no folio's state and no node.

The contract is in ``base``; ``cpu`` keeps it with CPU threads.
"""
