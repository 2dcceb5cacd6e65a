"""What a VM does, as flows."""
