"""The catalog: its parts, and snapshots of all names. Every write is one transaction."""

from __future__ import annotations

from dataclasses import replace

from loray.catalog.adapters import Adapters, Bases, Evaluations, Tags
from loray.catalog.aliases import Aliases, Canaries
from loray.catalog.backup import Backup
from loray.catalog.batches import Batches
from loray.catalog.database import Connections, Database, open_database
from loray.catalog.files import Files
from loray.catalog.identity import Audit, Keys, Logins, Tenants
from loray.catalog.jobs import Jobs
from loray.catalog.leases import Leases
from loray.catalog.quarantine import Quarantine
from loray.catalog.queries import read_counter
from loray.catalog.quotas import Quotas
from loray.catalog.removal import Claims, Removal
from loray.catalog.snapshot import CatalogSnapshot, changes_since
from loray.catalog.tinker import Tinker
from loray.catalog.usage import UsageTable
from loray.settings import DEFAULT_GATE_TOLERANCE, DEFAULT_SNAPSHOT_BYTES, Settings
from loray.spec import Principal


class Catalog:
    """The catalog at a SQLAlchemy URL (sqlite or postgresql), whose tables are made when it is first opened.
    Thread-safe.

    The audit log records `actor` with every write. `gate_tolerance` and `gate_trusts_keys` are those of
    `aliases.failures`. Who opens it acts as the administrator of the default tenant, since the database's password
    allows more than that.
    """

    def __init__(
        self,
        url: str,
        *,
        actor: str = "local",
        gate_tolerance: float = DEFAULT_GATE_TOLERANCE,
        gate_trusts_keys: bool = False,
        max_snapshot_bytes: int = DEFAULT_SNAPSHOT_BYTES,
    ) -> None:
        connections = Connections(open_database(url))
        self._use(Database(connections, Principal(actor=actor), gate_tolerance, gate_trusts_keys, max_snapshot_bytes))

    def _use(self, db: Database) -> None:
        self._db = db
        self.adapters = Adapters(db)
        self.aliases = Aliases(db)
        self.audit = Audit(db)
        self.backup = Backup(db)
        self.bases = Bases(db)
        self.batches = Batches(db)
        self.canaries = Canaries(db)
        self.claims = Claims(db)
        self.evaluations = Evaluations(db)
        self.files = Files(db)
        self.jobs = Jobs(db)
        self.keys = Keys(db)
        self.leases = Leases(db)
        self.logins = Logins(db)
        self.quarantine = Quarantine(db)
        self.quotas = Quotas(db)
        self.removal = Removal(db)
        self.tags = Tags(db)
        self.tenants = Tenants(db)
        self.tinker = Tinker(db)
        self.usage = UsageTable(db)

    @classmethod
    def of(cls, settings: Settings, actor: str = "local") -> Catalog:
        """Open the catalog of these settings."""
        return cls(
            settings.catalog,
            actor=actor,
            gate_tolerance=settings.gate_tolerance,
            gate_trusts_keys=settings.gate_trusts_keys,
            max_snapshot_bytes=settings.snapshot_bytes,
        )

    def view(self, principal: Principal) -> Catalog:
        """The same catalog for this principal: what exists for it, what it may change, and who does it.

        Names that it adds belong to its tenant. It costs nothing, and needs no `close`.
        """
        view = object.__new__(type(self))
        view._use(replace(self._db, principal=principal))
        return view

    @property
    def principal(self) -> Principal:
        """The one who asks."""
        return self._db.principal

    @property
    def own_tenant(self) -> str:
        """The tenant of the names that this view adds."""
        return self._db.principal.tenant

    def close(self) -> None:
        self._db.engine.dispose()

    def change_counter(self) -> int:
        """The change counter, which grows with every write to names: a snapshot with the same one is up to date."""
        with self._db.reading() as c:
            return read_counter(c)

    def snapshot(self, before: CatalogSnapshot | None = None, *, whole: bool = False) -> CatalogSnapshot:
        """All names of the caller now. Only what changed since the snapshot `before` is read; the rest is shared.

        `before` must be the caller's. `whole`: all is read, for it may be of another copy of this catalog: the database
        may have been restored.
        """
        before = before or CatalogSnapshot()
        with self._db.reading() as c:
            whole = whole or read_counter(c) < before.counter
            return before.after(changes_since(c, self.principal, before, whole=whole))
