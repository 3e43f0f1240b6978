"""The one place that decides the operator namespace.

The namespace follows the name under which this package was imported, so that two versions of it can live in one
process. The kernel-hub builder replaces this file by one with the same two names.
"""

import torch

NAMESPACE = __package__.replace(".", "_")
ops = getattr(torch.ops, NAMESPACE)


def add_op_namespace_prefix(op_name: str) -> str:
    """`name` to `namespace::name`."""
    return f"{NAMESPACE}::{op_name}"
