"""Who asks, in front of the gateway and of the catalog's API: keys, tenants, and what a browser may be tricked into."""

from serve_apps.access.door import Access, open_access
from serve_apps.access.middleware import Asking, CheckAccess, principal_of, until_revoked
from serve_apps.access.permission import Permissions, may

__all__ = [
    "Access",
    "Asking",
    "CheckAccess",
    "Permissions",
    "may",
    "open_access",
    "principal_of",
    "until_revoked",
]
