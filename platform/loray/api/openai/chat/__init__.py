"""What is a chat's alone: messages, tools that the model may call, and its calls in answers."""
