drop function ibex_core.list_org_ids();
drop table ibex_core.limits, ibex_core.tokens, ibex_core.agents, ibex_core.users, ibex_core.organizations;
