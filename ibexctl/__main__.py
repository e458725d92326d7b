"""`python -m ibexctl`: the same as `ibexctl`."""

from ibexctl.app import main

main()
