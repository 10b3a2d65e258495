-- The role that KEDA asks as: it may count jobs by queue and state, and see nothing else.
-- psql -v password=... < role.sql, once, on the migrated database.
CREATE ROLE keda LOGIN PASSWORD :'password' CONNECTION LIMIT 30;
GRANT SELECT (queue, state) ON jobs TO keda;
