"""Random requests of several keys to the catalog's API, each compared with the model's answer."""

from __future__ import annotations

import httpx
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from loray.spec import Principal
from tests.fixtures.api import Api
from tests.serve_apps.api.machine.asking import AskingMachine
from tests.serve_apps.api.machine.model import BASE, DEFAULT, Caller, Model, Refused

SCOPES = ("infer", "publish", "promote", "train")
WHO = st.runner().flatmap(lambda machine: st.sampled_from(machine.callers))
NAMES = st.sampled_from(["tone", "tone", "Law_9"])
TENANTS = st.sampled_from([DEFAULT, "acme", "beta", "gamma"])
OF = st.sampled_from([None, None, None, DEFAULT, "acme", "gamma"])  # `?tenant=`
ALIASES = st.sampled_from(["prod", "canary"])
VERSIONS = st.sampled_from([1, 1, 2, 2, 3])
SHARING = [
    ("private", []),
    ("public", []),
    ("shared", ["acme", "beta"]),
    ("shared", [DEFAULT, "gamma"]),
    ("shared", []),
    ("private", ["acme"]),
]
RARELY = st.sampled_from([False, False, False, False, True])
OFFSETS = st.sampled_from([None, None, None, 0, 0, 1])  # of If-Match from the revision; None: no precondition


class CatalogMachine(AskingMachine):
    """`callers`: keys of three tenants with all scopes, an administrator's, and those that are made later."""

    def __init__(self, api: Api, model: Model) -> None:
        super().__init__(api, model)
        self.callers: list[Caller] = []
        self.num_keys = 0
        self.digests = [*model.stored, "f" * 64]  # the last one is nowhere

    @initialize()
    def begin(self) -> None:
        for tenant in (DEFAULT, "acme", "beta"):
            if tenant != DEFAULT:
                self.make_tenant(self.root, tenant)
            self.make_key(tenant, frozenset(SCOPES))
        self.make_key(DEFAULT, frozenset({"admin"}))
        for who in self.callers[:2]:
            for number in (0, 1):
                self.bring(who, number)
                self.register(who, None, "tone", number, None, ["prod"])

    # -- tenants and keys ---------------------------------------------------------------------------------------------

    def make_tenant(self, who: Caller, name: str) -> None:
        def right() -> None:
            if name in self.model.blocked:
                raise Refused(409)
            self.model.blocked[name] = False

        self.ask(who, "admin", "POST", "/tenants", right, json={"name": name})

    def make_key(self, tenant: str, scopes: frozenset[str]) -> None:
        def right() -> Caller:
            if tenant not in self.model.blocked:
                raise Refused(404)
            return Caller("", tenant, scopes)

        self.num_keys += 1
        body = {"key_alias": f"key {self.num_keys}", "tenant": tenant, "scopes": sorted(scopes)}
        self._take(self.ask(self.root, "admin", "POST", "/keys", right, json=body))

    def _take(self, made: tuple[httpx.Response, Caller] | None) -> None:
        if made is not None:
            answer, key = made[0].json(), made[1]
            key.secret, key.id = answer["key"], answer["id"]
            assert (answer["tenant"], set(answer["scopes"])) == (key.tenant, key.scopes)
            self.callers.append(key)

    @rule(
        what=st.sampled_from(["make", "make", "block", "revoke", "rotate"]),
        who=WHO,
        key=WHO,
        name=TENANTS,
        scopes=st.sets(st.sampled_from([*SCOPES, "admin"]), min_size=1),
    )
    def manage(self, what: str, who: Caller, key: Caller, name: str, scopes: set[str]) -> None:
        if what == "make":
            self.make_tenant(who, name)
            if len(self.callers) < 6:
                self.make_key(name, frozenset(scopes))
        elif what == "block":
            for asking, is_blocked in ((who, True), (self.root, False)):
                self._block_key(asking, key, is_blocked)
                self._block_tenant(asking, name, is_blocked)
                self.list_all(key, 3)
        else:
            self._end_key(key, by_itself=what == "rotate")

    def _block_key(self, who: Caller, of: Caller, is_blocked: bool) -> None:
        def right() -> None:
            of.is_blocked = is_blocked

        self.ask(who, "admin", "PATCH", f"/keys/{of.id}", right, json={"blocked": is_blocked})

    def _block_tenant(self, who: Caller, name: str, is_blocked: bool) -> None:
        def right() -> None:
            if name not in self.model.blocked:
                raise Refused(404)
            self.model.blocked[name] = is_blocked

        self.ask(who, "admin", "PATCH", f"/tenants/{name}", right, json={"blocked": is_blocked})

    def _end_key(self, key: Caller, *, by_itself: bool) -> None:
        """It is rotated, by itself, or revoked where there are others."""

        def right() -> Caller:
            if by_itself and "_" in key.id:  # made by a rotation, less than a day ago
                raise Refused(409)
            key.is_revoked = True
            return Caller("", key.tenant, key.scopes)

        if by_itself:
            self._take(self.ask(key, None, "POST", f"/keys/{key.id}/rotate", right, json={}))
        elif len(self.callers) > 4:
            self.ask(self.root, "admin", "DELETE", f"/keys/{key.id}", right)
        if key.is_revoked:
            self.callers.remove(key)
        self.list_all(key, 3)

    # -- adapters -----------------------------------------------------------------------------------------------------

    @rule(who=WHO, number=st.integers(0, 3))
    def bring(self, who: Caller, number: int) -> None:
        """As an upload does at its end."""
        digest = self.digests[number]
        self.api.catalog.view(Principal(tenant=who.tenant, scopes=frozenset())).adapters.record_upload(digest)
        self.model.uploads.add((who.tenant, digest))

    @rule(
        who=WHO,
        of=OF,
        name=st.sampled_from(["tone", "tone", "tone", "Law_9", BASE]),
        number=st.sampled_from([0, 1, 2, 2, 2, 3, 3, -1]),
        version=st.sampled_from([None, None, None, 1, 3]),
        aliases=st.lists(ALIASES, max_size=1),
    )
    def register(
        self, who: Caller, of: str | None, name: str, number: int, version: int | None, aliases: list[str]
    ) -> None:
        digest, before = self.digests[number], {name: dict(a.aliases) for name, a in self.model.adapters.items()}
        made = self.ask(
            who,
            "publish",
            "POST",
            f"/adapters/{name}/versions",
            lambda: self.model.register(who, of, name, digest, version=version, aliases=aliases),
            params={"tenant": of},
            json={"digest": digest, "aliases": aliases} | ({} if version is None else {"version": version}),
        )
        if made is None:
            return
        answer, (adapter, right) = made
        self.compare(answer.json(), self.version(adapter, right))
        for alias in aliases:
            moved = before.get(adapter.name, {}).get(alias) != right
            self.note_alias(adapter, alias, moved=moved)

    @rule(who=WHO, of=OF, name=NAMES, version=VERSIONS, other=WHO, stays=RARELY)
    def delete_version(self, who: Caller, of: str | None, name: str, version: int, other: Caller, stays: bool) -> None:
        """Of a version at which an alias has pointed, where that may be."""
        for target in (version, version % 2 + 1):
            self.put_alias(who, of, name, "canary", target, None, reason=True)
        right = lambda: self.model.delete_version(who, of, name, version)  # noqa: E731
        path = f"/adapters/{name}/versions/{version}"
        deleted = self.ask(who, "publish", "DELETE", path, right, params={"tenant": of})
        self.look(other, of, name)
        if deleted is not None:  # no alias comes back to it, be it rolled back or pointed there
            self.roll_back(who, of, name, "canary", None)
            for alias in ("prod", "canary"):
                self.put_alias(who, of, name, alias, version, None, reason=True)
        if not stays:
            self.restore(who, of, name, version)

    @rule(who=WHO, of=OF, name=NAMES, other=WHO, stays=RARELY)
    def delete(self, who: Caller, of: str | None, name: str, other: Caller, stays: bool) -> None:
        right = lambda: self.model.delete(who, of, name)  # noqa: E731
        self.ask(who, "publish", "DELETE", f"/adapters/{name}", right, params={"tenant": of})
        self.look(other, of, name)
        if not stays:
            self.restore(who, of, name, None)

    @precondition(lambda self: any(a.is_deleted or a.deleted for a in self.model.adapters.values()))
    @rule(who=WHO, of=OF, name=NAMES, version=st.one_of(st.none(), VERSIONS))
    def restore(self, who: Caller, of: str | None, name: str, version: int | None) -> None:
        path = f"/adapters/{name}/restore" if version is None else f"/adapters/{name}/versions/{version}/restore"
        right = lambda: self.model.restore(who, of, name, version)  # noqa: E731
        restored = self.ask(who, "publish", "POST", path, right, params={"tenant": of})
        if restored is not None:
            answer, adapter = restored
            shown = self.adapter(who, adapter) if version is None else self.version(adapter, version)
            self.compare(answer.json(), shown)

    @rule(who=WHO, of=OF, name=NAMES, sharing=st.sampled_from(SHARING))
    def share(self, who: Caller, of: str | None, name: str, sharing: tuple[str, list[str]]) -> None:
        visibility, shared_with = sharing
        shared = self.ask(
            who,
            "publish",
            "PATCH",
            f"/adapters/{name}",
            lambda: self.model.share(who, of, name, visibility, shared_with),
            params={"tenant": of},
            json={"visibility": visibility, "shared_with": shared_with},
        )
        if shared is not None:
            self.compare(shared[0].json(), self.adapter(who, shared[1]))

    @rule(
        who=WHO,
        limit=st.integers(1, 3),
        tenant=OF,
        method=st.sampled_from([None, None, "lora", "longlora"]),
        search=st.sampled_from([None, None, "TON", "_", "%", "acme/"]),
    )
    def list_adapters(
        self, who: Caller, limit: int, tenant: str | None, method: str | None, search: str | None
    ) -> None:
        self.list_all(who, limit, tenant=tenant, method=method, search=search)

    @rule(who=WHO, of=OF, name=NAMES)
    def show(self, who: Caller, of: str | None, name: str) -> None:
        self.look(who, of, name)

    # -- aliases ------------------------------------------------------------------------------------------------------

    @rule(who=WHO, of=OF, name=NAMES, alias=ALIASES, version=VERSIONS, offset=OFFSETS, reason=st.booleans())
    def put_alias(
        self, who: Caller, of: str | None, name: str, alias: str, version: int, offset: int | None, reason: bool
    ) -> None:
        tag, headers = self.if_match(who, of, name, alias, offset)
        put = self.ask(
            who,
            "promote",
            "PUT",
            f"/adapters/{name}/aliases/{alias}",
            lambda: self.model.put_alias(who, of, name, alias, version, tag, reason),
            params={"tenant": of},
            headers=headers,
            json={"version": version} | ({"no_gate": "it is a test"} if reason else {}),
        )
        if put is not None:
            answer, (adapter, is_new, moved) = put
            assert answer.status_code == (201 if is_new else 200)
            self.note_answer(answer, adapter, alias, moved=moved)

    @rule(who=WHO, of=OF, name=NAMES, alias=ALIASES, offset=OFFSETS)
    def roll_back(self, who: Caller, of: str | None, name: str, alias: str, offset: int | None) -> None:
        tag, headers = self.if_match(who, of, name, alias, offset)
        right = lambda: self.model.roll_back(who, of, name, alias, tag)  # noqa: E731
        path = f"/adapters/{name}/aliases/{alias}/rollback"
        rolled = self.ask(who, "promote", "POST", path, right, params={"tenant": of}, headers=headers)
        if rolled is not None:
            self.note_answer(rolled[0], rolled[1], alias, moved=True)

    @rule(who=WHO, of=OF, name=NAMES, alias=ALIASES, offset=OFFSETS)
    def delete_alias(self, who: Caller, of: str | None, name: str, alias: str, offset: int | None) -> None:
        tag, headers = self.if_match(who, of, name, alias, offset)
        right = lambda: self.model.delete_alias(who, of, name, alias, tag)  # noqa: E731
        path = f"/adapters/{name}/aliases/{alias}"
        self.ask(who, "promote", "DELETE", path, right, params={"tenant": of}, headers=headers)
