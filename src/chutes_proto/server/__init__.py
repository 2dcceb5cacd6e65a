"""What the key server does, as flows."""
