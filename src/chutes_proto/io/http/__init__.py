"""HTTP and TLS as a client."""
