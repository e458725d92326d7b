"""The SQL by which operators change organizations, users, agents and tokens."""

SET_STATUS = {
    "organization": "update ibex_core.organizations set status = $2 where org_id = $1 returning *",
    "user": "update ibex_core.users set status = $2 where user_id = $1 returning *",
    "agent": "update ibex_core.agents set status = $2 where agent_id = $1 returning *",
}

MINT = """
insert into ibex_core.tokens (token_id, org_id, user_id, agent_id, name, prefix, digest, permissions, expires_at)
values ($1, $2, $3, $4, $5, $6, $7, $8, clock_timestamp() + $9::interval)
returning *
"""

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
