"""The robot's side of the data plane: a durable spool, the client that empties it, numpy inference. No torch."""
