"""The pages by what they are about. Each module has `create_router`."""
