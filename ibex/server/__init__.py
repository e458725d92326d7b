"""The processes of a node: the supervisor, its children, and the HTTP edge they serve."""
