"""The journal: finished turns on this node's disk until both stores have them."""
