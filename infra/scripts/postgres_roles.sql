-- The roles and the database of ibex on a Postgres of your own (15 or later). As a superuser:
--
--   psql -v owner_password="'…'" -v app_password="'…'" -f infra/scripts/postgres_roles.sql
--
-- The variable `database` (default ibex) names another database. Then:
--
--   IBEX_POSTGRES_ADMIN_DSN=postgresql://ibex_owner:…@host/ibex   migrations and operator commands
--   IBEX_POSTGRES_DSN=postgresql://ibex_app:…@host/ibex           all that `ibexctl serve` opens
--
-- Running it again changes the passwords and nothing else.

\set ON_ERROR_STOP on
\if :{?database} \else \set database ibex \endif

select 'create role ibex_owner' where not exists (select from pg_roles where rolname = 'ibex_owner') \gexec
select 'create role ibex_app' where not exists (select from pg_roles where rolname = 'ibex_app') \gexec
alter role ibex_owner login nosuperuser nobypassrls nocreatedb nocreaterole noinherit password :owner_password;
alter role ibex_app login nosuperuser nobypassrls nocreatedb nocreaterole noinherit password :app_password;

select format('create database %I owner ibex_owner encoding %L template template0', :'database', 'UTF8')
where not exists (select from pg_database where datname = :'database') \gexec
alter database :"database" owner to ibex_owner;
revoke all on database :"database" from public;
grant connect on database :"database" to ibex_app;
