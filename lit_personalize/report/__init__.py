"""Tables that are measured by code."""
