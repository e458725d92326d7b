#!/bin/sh
# Makes ibex's roles and database when the volume of Postgres is new.
set -eu
exec psql --username "${POSTGRES_USER:-postgres}" --dbname postgres --file /ibex/postgres_roles.sql \
    --set owner_password="'$OWNER_PASSWORD'" --set app_password="'$APP_PASSWORD'"
