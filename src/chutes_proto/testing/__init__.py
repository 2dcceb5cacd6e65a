"""What tests of this project and of its users need: a simulated TDX platform, playbooks, the store contract suite."""
