#!/bin/sh
# Run by the image of PostgreSQL when its volume is empty: a role that is no superuser, and a database of its own to try
# things with. For a database of others see `cdc init`.
set -eu
psql --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname postgres --set password="$CDC_PASSWORD" <<'SQL'
CREATE ROLE cdc LOGIN REPLICATION PASSWORD :'password';
GRANT SET ON PARAMETER session_replication_role TO cdc;
CREATE DATABASE shop OWNER cdc;
CREATE DATABASE shop_backup OWNER cdc;
\connect shop
SET ROLE cdc;
CREATE TABLE orders (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, customer text NOT NULL, total numeric NOT NULL);
INSERT INTO orders (customer, total) VALUES ('Ada', 12.50), ('Grace', 99);
SQL
