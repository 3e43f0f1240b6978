"""The network under training, its adapters and copies."""
