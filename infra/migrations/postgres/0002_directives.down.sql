drop table ibex_core.directives, ibex_core.directive_versions;
drop function ibex_core.refuse_rewriting();
