-- Whose traces must never be stored again. Whoever inserts traces asks afterwards, whoever erases notes it here first: so
-- either finds what the other has done, whichever of them was quicker.
create table if not exists erased_organizations
(
    org_id    UUID,
    erased_at DateTime64(3, 'UTC') default now64(3)
)
engine = ReplacingMergeTree(erased_at)
order by org_id
settings fsync_after_insert = 1, fsync_part_directory = 1;
