"""Files and batches of tenants: `/v1/files`, `/v1/batches`."""
