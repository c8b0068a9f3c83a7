"""Rows x templates -> prompted records, in a sandboxed process or several."""
