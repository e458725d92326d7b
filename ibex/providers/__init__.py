"""Vendors of models, and the transport that reaches them."""
