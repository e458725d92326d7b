"""The command line of ibex."""
