"""What a VM does, as flows: the exchange as a table, the retry policy, the flows that follow both."""
