"""Commands on what lies below the adapters: `loray store`, the objects; `loray catalog`, the database."""
