"""The exit gate: every line of a phase's checklist, proved against a running house, and what a release needs besides.

`checklist.py` is the list; `python -m infra.gate` (or `make exit-gate`) runs it. A line is a function that returns a
`Proof`. What needs a house is asked of `Site`: a server of the gate's own with embedded stores, a stand-in for the
provider, a wiretap between the two, and a receiver for spans.
"""
