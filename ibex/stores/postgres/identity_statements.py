"""The SQL by which operators change organizations, users, agents and tokens."""

SET_STATUS = {
    "organization": "update ibex_core.organizations set status = $2 where org_id = $1 returning *",
    "user": "update ibex_core.users set status = $2 where user_id = $1 returning *",
    "agent": "update ibex_core.agents set status = $2 where agent_id = $1 returning *",
}

MINT = """
insert into ibex_core.tokens (token_id, org_id, user_id, agent_id, name, prefix, digest, permissions, expires_at)
values ($1, $2, $3, $4, $5, $6, $7, $8, least(clock_timestamp() + $9::interval, $10::timestamptz))
returning *
"""
"""`least` passes over nulls: without a span and a last moment the token never expires."""

LOCK_MINTER = """
select t.token_id, t.org_id, t.user_id, t.agent_id, t.permissions, t.digest, t.expires_at,
       t.expires_at - clock_timestamp() as expires_in,
       t.revoked_at is null and coalesce(t.expires_at > clock_timestamp(), true)
       and o.status = 'active' and u.status = 'active' and coalesce(a.status, 'active') = 'active' as is_valid
from ibex_core.tokens as t
join ibex_core.organizations as o using (org_id)
join ibex_core.users as u on u.org_id = t.org_id and u.user_id = t.user_id
left join ibex_core.agents as a on a.org_id = t.org_id and a.agent_id = t.agent_id
where t.token_id = $1 for no key update of t
"""
"""A revocation waits for the token that is being minted, or is seen by it."""

LOCK_PREDECESSOR = """
select org_id, user_id, agent_id, name, permissions, expires_at - created_at as lifetime,
       revoked_at is null and coalesce(expires_at > clock_timestamp(), true) as is_valid
from ibex_core.tokens where token_id = $1 for no key update
"""

SHORTEN = """
update ibex_core.tokens set expires_at = least(expires_at, clock_timestamp() + $2::interval)
where token_id = $1 returning *
"""

REVOKE_ONE = """
update ibex_core.tokens set revoked_at = clock_timestamp() where token_id = $1 and revoked_at is null returning *
"""

REVOKE_MANY = """
update ibex_core.tokens set revoked_at = clock_timestamp()
where org_id = $1 and ($2::uuid is null or agent_id = $2) and revoked_at is null
returning *
"""

REVOKE_MINTED = """
with recursive minted (token_id) as (
    select entity_id from ibex_core.audit_events
    where org_id = $1 and entity_kind = 'token' and action = 'mint' and actor = 'ibex_pat_' || $2::uuid
    union
    select e.entity_id from minted as m join ibex_core.audit_events as e
        on e.actor = 'ibex_pat_' || m.token_id or e.details ->> 'rotated_from' = m.token_id::text
    where e.org_id = $1 and e.entity_kind = 'token' and e.action = 'mint'
)
update ibex_core.tokens as t set revoked_at = clock_timestamp() from minted as m
where t.org_id = $1 and t.token_id = m.token_id and t.revoked_at is null
returning t.*
"""
"""What a token minted, what that minted in its turn, and their successors by rotation; not its own successor."""
