-- A shop's database of ten tables: 5 GB with its indexes where the setting bench.scale is 1, the largest of them
-- 20,000,000 rows and more than half of all. Keys, indexes and foreign keys come last, for speed.

CREATE FUNCTION pg_temp.scaled(at_full_size bigint) RETURNS bigint LANGUAGE sql STABLE AS $$
    SELECT greatest(1, (at_full_size * current_setting('bench.scale')::float8)::bigint)
$$;

CREATE TYPE order_status AS ENUM ('open', 'paid', 'sent', 'returned');

CREATE TABLE country AS
SELECT i AS id, chr(65 + i / 26) || chr(65 + i % 26) AS code, 'Country ' || i AS name
  FROM generate_series(0, 249) AS i;

CREATE TABLE customer AS
SELECT i AS id, 'Customer ' || i AS name, md5(i::text) || '@example.org' AS email, (i % 250)::int AS country_id,
       timestamptz '2020-01-01' + i * interval '1 minute' AS created_at,
       jsonb_build_object('street', md5((-i)::text), 'number', i % 200, 'zip', lpad((i % 99999)::text, 5, '0')) AS address
  FROM generate_series(1, pg_temp.scaled(500000)) AS i;

CREATE TABLE product AS
SELECT i AS id, 'SKU-' || i AS sku, 'Product ' || md5(i::text) AS name, (i % 10000 / 100.0)::numeric(10, 2) AS price,
       ARRAY['tag ' || i % 7, 'tag ' || i % 11] AS tags, i % 3 = 0 AS active
  FROM generate_series(1, pg_temp.scaled(100000)) AS i;

CREATE TABLE stock AS
SELECT p AS product_id, w::smallint AS warehouse, p % 1000 AS quantity, (p * w)::float8 / 7 AS weight
  FROM generate_series(1, pg_temp.scaled(100000)) AS p, generate_series(1, 5) AS w;

CREATE TABLE orders AS
SELECT i AS id, 1 + i * 7919 % pg_temp.scaled(500000) AS customer_id,
       timestamptz '2024-01-01' + i * interval '13 seconds' AS placed_at,
       ('{open,paid,sent,returned}'::order_status[])[1 + i % 4] AS status,
       (i % 100000 / 100.0)::numeric(12, 2) AS total,
       CASE WHEN i % 5 = 0 THEN 'please ring ' || i END AS note
  FROM generate_series(1, pg_temp.scaled(2000000)) AS i;

CREATE TABLE order_line AS
SELECT o AS order_id, l::int AS line, 1 + (o * 31 + l) % pg_temp.scaled(100000) AS product_id,
       (o % 9 + 1)::int AS quantity, (o % 10000 / 100.0)::numeric(10, 2) AS price
  FROM generate_series(1, pg_temp.scaled(2000000)) AS o, generate_series(1, 3) AS l;

CREATE TABLE payment AS
SELECT md5(i::text)::uuid AS id, i AS order_id, (i % 100000 / 100.0)::numeric(12, 2) AS amount,
       date '2024-01-01' + (i % 600)::int AS paid_on, decode(md5('signature ' || i), 'hex') AS signature
  FROM generate_series(1, pg_temp.scaled(1000000)) AS i;

CREATE TABLE login AS
SELECT i AS id, 1 + i % pg_temp.scaled(500000) AS customer_id, ('10.' || i % 256 || '.0.1')::inet AS address,
       i % 86400 * interval '1 second' AS lasted, json_build_object('agent', 'browser ' || i % 40, 'n', i) AS details,
       timestamp '2024-01-01' + i * interval '1 second' AS at
  FROM generate_series(1, pg_temp.scaled(1000000)) AS i;

-- larger than a page each, and hardly to be compressed: they lie in the TOAST table
CREATE TABLE document AS
SELECT d AS id, 'Document ' || d AS title, string_agg(md5((d * 1000 + n)::text), '') AS body
  FROM generate_series(1, pg_temp.scaled(60000)) AS d, generate_series(1, 250) AS n
 GROUP BY d;

CREATE TABLE event AS
SELECT i AS id, 1 + i * 7919 % pg_temp.scaled(500000) AS customer_id,
       timestamptz '2025-01-01' + i * interval '1.5 seconds' AS happened_at, (i % 12)::smallint AS kind,
       'page/' || i % 1000 || '/' || i AS path, (i % 5000 / 100.0)::numeric(8, 2) AS value, i % 2 = 0 AS seen
  FROM generate_series(1, pg_temp.scaled(20000000)) AS i;

ALTER TABLE country ADD PRIMARY KEY (id);
ALTER TABLE customer ADD PRIMARY KEY (id), ADD UNIQUE (email),
    ADD FOREIGN KEY (country_id) REFERENCES country;
ALTER TABLE product ADD PRIMARY KEY (id), ADD UNIQUE (sku), ADD CHECK (price >= 0);
ALTER TABLE stock ADD PRIMARY KEY (product_id, warehouse), ADD FOREIGN KEY (product_id) REFERENCES product;
ALTER TABLE orders ADD PRIMARY KEY (id), ADD FOREIGN KEY (customer_id) REFERENCES customer;
ALTER TABLE order_line ADD PRIMARY KEY (order_id, line), ADD FOREIGN KEY (order_id) REFERENCES orders,
    ADD FOREIGN KEY (product_id) REFERENCES product;
ALTER TABLE payment ADD PRIMARY KEY (id), ADD FOREIGN KEY (order_id) REFERENCES orders;
ALTER TABLE login ADD PRIMARY KEY (id), ADD FOREIGN KEY (customer_id) REFERENCES customer;
ALTER TABLE document ADD PRIMARY KEY (id);
ALTER TABLE event ADD PRIMARY KEY (id), ADD FOREIGN KEY (customer_id) REFERENCES customer;
CREATE INDEX ON orders (customer_id);
CREATE INDEX ON orders (placed_at) WHERE status = 'open';
CREATE INDEX ON order_line (product_id);
CREATE INDEX ON customer (lower(name));
CREATE INDEX ON login USING gin (((details::jsonb)) jsonb_path_ops);
CREATE INDEX ON event (customer_id);
CREATE INDEX ON event (happened_at);
