"""The parent of a node's processes: sockets, engines, children's lives, restarts and stops."""
