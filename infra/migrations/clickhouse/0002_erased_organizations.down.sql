drop table if exists erased_organizations;
