-- An organization is `erasing` from the moment its erasure begins until its row goes with the last of its rows. Its tokens
-- are refused as those of a suspended one are, and turns that still come are dropped. A migration of its own, since the lock
-- on organizations stops every look-up of a caller: it must wait for nothing else, and nothing else be done again for it.
alter table ibex_core.organizations drop constraint organizations_status_check;
alter table ibex_core.organizations add constraint organizations_status_check
    check (status in ('active', 'suspended', 'erasing'));
