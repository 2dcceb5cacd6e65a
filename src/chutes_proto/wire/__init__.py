"""The wire: messages, their JSON, the endpoint table, HTTP values."""
