"""The gateway alone: engines that compute nothing yield tokens, a client in another process reads them from sockets."""
