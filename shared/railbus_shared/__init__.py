"""What every railbus process shares: the bus, the wire, the contracts, the errors, the layout of the tree."""
