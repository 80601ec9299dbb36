"""From the tokens of a request's choices to its answer: texts, events or one body, and the connection to the client."""
