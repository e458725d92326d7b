drop table ibex_core.checkpoints, ibex_core.sessions;
