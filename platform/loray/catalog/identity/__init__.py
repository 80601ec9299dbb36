"""Who may use a deployment: tenants, keys, who sees adapters, the audit log, and what requests used."""

from loray.catalog.identity.allowances import Allowances
from loray.catalog.identity.audit import Audit, AuditEntry, AuditPage, AuditState, Refusals, Refused
from loray.catalog.identity.keys import KeyPage, Keys, NewKey
from loray.catalog.identity.logins import Logins
from loray.catalog.identity.quotas import Quotas, QuotaState, QuotaUse
from loray.catalog.identity.sharing import Sharing
from loray.catalog.identity.tenants import Tenants
from loray.catalog.identity.transfer import Transfer
from loray.catalog.identity.usage import Usage, UsageRow

__all__ = [
    "Allowances",
    "Audit",
    "AuditEntry",
    "AuditPage",
    "AuditState",
    "KeyPage",
    "Keys",
    "Logins",
    "NewKey",
    "QuotaState",
    "QuotaUse",
    "Quotas",
    "Refusals",
    "Refused",
    "Sharing",
    "Tenants",
    "Transfer",
    "Usage",
    "UsageRow",
]
