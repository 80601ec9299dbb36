"""Who may use a deployment: tenants, their API keys, who sees their adapters, and the audit log of what they did."""

from loray.catalog.identity.audit import Audit, AuditEntry, AuditPage
from loray.catalog.identity.keys import KeyPage, Keys, NewKey
from loray.catalog.identity.sharing import Sharing
from loray.catalog.identity.tenants import Tenants

__all__ = [
    "Audit",
    "AuditEntry",
    "AuditPage",
    "KeyPage",
    "Keys",
    "NewKey",
    "Sharing",
    "Tenants",
]
