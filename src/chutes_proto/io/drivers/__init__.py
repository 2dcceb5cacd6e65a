"""The interpreters of effects: one synchronous, one asynchronous."""
