drop table if exists llm_traces;
