update ibex_core.organizations set status = 'suspended' where status = 'erasing';
alter table ibex_core.organizations drop constraint organizations_status_check;
alter table ibex_core.organizations add constraint organizations_status_check check (status in ('active', 'suspended'));
