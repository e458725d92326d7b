drop index ibex_core.checkpoints_recorded_at_idx;
drop function ibex_core.prune_checkpoints(interval, integer);
drop table ibex_core.retention;
revoke insert, update on ibex_core.sessions, ibex_core.checkpoints from ibex_app;
grant insert, update on ibex_core.sessions, ibex_core.checkpoints to ibex_app;
