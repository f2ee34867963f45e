"""The messages and files that processes exchange, as frozen pydantic models grouped by area."""
