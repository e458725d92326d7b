"""`ibexctl bench`: what the proxy costs, measured beside a run without it, with a verdict.

The command's process drives; load and the canned provider are processes of their own, so that none of them runs in
the loop that is measured. docs/performance.md tells the method.
"""
