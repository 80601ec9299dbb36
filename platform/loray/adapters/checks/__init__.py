"""What an adapter's files may say: checked before anything is allocated or computed by it. Works without torch."""
