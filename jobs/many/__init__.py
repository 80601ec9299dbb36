"""Jobs that train several adapters in one process, each on its own data, and publish them as they end."""
