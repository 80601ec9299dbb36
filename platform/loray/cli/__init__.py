"""The `loray` command: bases, adapters, and the local Ray cluster; further commands come by entry point."""
