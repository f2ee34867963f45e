"""Devices, leases, submissions and placement."""
