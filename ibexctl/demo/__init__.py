"""`ibexctl demo`: the promises of ibex, broken on purpose on a server of one's own, and counted."""
