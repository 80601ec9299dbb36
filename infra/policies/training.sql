-- What the database user of training may do in the catalog. Run it as the owner of the catalog's tables, once they are
-- there, and make the user a member: CREATE USER trainer PASSWORD '…' IN ROLE loray_training. It has no right on keys
-- and usage, changes no tenant, and removes nothing but the claims of its publications; the tables themselves change only
-- under their owner.
CREATE ROLE loray_training NOLOGIN;
GRANT SELECT ON alembic_version, adapters, aliases, alias_moves, bases, canaries, changes, evaluations, files, jobs, projections, shares,
    tags, tenants, uploads, versions, quarantine TO loray_training;
GRANT SELECT (id, hash) ON audit_log TO loray_training;
GRANT INSERT ON adapters, aliases, alias_moves, audit_log, bases, jobs, projections, uploads, versions
    TO loray_training;
GRANT SELECT, INSERT, DELETE ON claims TO loray_training;
GRANT UPDATE ON adapters, aliases, changes, jobs TO loray_training;
GRANT UPDATE (ended_at, outcome, reason) ON canaries TO loray_training; -- an alias that moves has no canary any more
GRANT UPDATE (deleted_at) ON versions TO loray_training; -- a version that was deleted and is published again
GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO loray_training;
