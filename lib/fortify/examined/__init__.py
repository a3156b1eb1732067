"""The published paper taken apart: its protocol, its printed numbers, its claims."""
